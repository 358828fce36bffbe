"""Every diagnostic code is documented, and shown by a golden pair or a named test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastgrad_grammar.codes import CODES
from tests.golden_errors import ERRORS

ROOT = Path(__file__).parent.parent
SECTIONS = dict(
    re.findall(r"^## (FG\d+): (.+)$", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), re.M)
)
SHOWN = set(re.findall(r"\[(FG\d+)\]", "".join(path.read_text("utf-8") for path in ERRORS.glob("*.out"))))

WITHOUT_FILE = {
    "FG001": "tests/grammar/test_read.py::test_missing_file_suggests_the_nearest_name",
    "FG002": "tests/grammar/test_read.py::test_file_that_is_not_utf8",
    "FG003": "tests/grammar/test_read.py::test_large_file_is_refused",
    "FG312": "tests/calibration/test_refusal.py::test_every_remedy_works",
    "FG411": "tests/dsl/test_training.py::test_a_text_that_is_missing_or_too_short_is_a_diagnostic",
    "FG313": "tests/compiler/test_memory.py::test_sizes",
    "FG314": "tests/compiler/test_memory.py::test_every_limit_is_kept_or_refused",
    "FG412": "tests/dsl/test_training.py::test_a_text_that_is_missing_or_too_short_is_a_diagnostic",
    "FG413": "tests/dsl/test_training.py::test_resuming_needs_a_checkpoint_of_the_same_run",
    "FG414": "tests/dsl/test_training.py::test_resuming_needs_a_checkpoint_of_the_same_run",
    "FG415": "tests/dsl/test_cli.py::test_train_refuses_what_it_cannot_train",
    "FG416": "tests/dsl/test_cli.py::test_report_refuses_what_does_not_fit",
    "FG417": "tests/dsl/test_cli.py::test_stages_prints_the_program_after_a_pass",
    "FG418": "tests/dsl/test_cli.py::test_report_refuses_what_does_not_fit",
    "FG419": "tests/dsl/test_cli.py::test_report_refuses_what_does_not_fit",
    "FG420": "tests/dsl/test_cli.py::test_targets_that_are_not_there_are_refused",
    "FG421": "tests/dsl/test_cli.py::test_a_folder_that_cannot_be_written_is_a_diagnostic",
    "FG422": "tests/dsl/test_cli.py::test_cpp_kernels_are_built_ahead_or_a_warning_says_why_not",
    "FG423": "tests/dsl/test_advise.py::test_wrong_batches",
    "FG430": "tests/dsl/test_documents.py::test_a_text_that_is_no_document_is_named_with_its_place",
    "FG424": "tests/dsl/test_tune.py::test_tuning_without_a_gpu_is_a_diagnostic",
    "FG425": "tests/dsl/test_failures.py::test_a_stream_that_cannot_be_written",
    "FG426": "tests/dsl/test_failures.py::test_a_batch_larger_than_memory_is_refused",
    "FG427": "tests/dsl/test_failures.py::test_weights_that_are_not_finite_are_refused",
    "FG428": "tests/dsl/test_build_folder.py::test_a_folder_of_the_users_is_refused",
    "FG431": "tests/dsl/test_training_run.py::test_a_run_that_exists_is_refused_unless_forced",
    "FG432": "tests/dsl/test_training_run.py::test_one_training_at_a_time",
    "FG433": "tests/dsl/test_training_run.py::test_a_rate_that_is_far_too_large_stops_the_run",
    "FG434": "tests/dsl/test_generate.py::test_what_is_refused",
    "FG435": "tests/dsl/test_generate_command.py::test_a_state_of_another_model_or_a_damaged_one",
    "FG436": "tests/dsl/test_generate_command.py::test_tokenizers_that_cannot_be_used",
    "FG437": "tests/dsl/test_generate_command.py::test_what_is_refused",
    "FG438": "tests/lsp/test_command.py::test_a_missing_library_is_named",
    "FG501": "tests/compiler/test_step.py::test_what_mixes_tokens_or_sees_later_ones_is_refused_with_its_place",
    "FG502": "tests/compiler/test_step.py::test_a_dim_that_is_not_there_or_not_the_only_one_is_refused",
    "FG503": "tests/dsl/test_training_ranks.py::test_meshes_that_do_not_fit",
    "FG504": "tests/dsl/test_training_ranks.py::test_a_process_that_hangs_is_named",
    "FG601": "tests/checkpoints/test_faults.py::test_a_file_of_weights_that_is_cut_or_lies",
    "FG602": "tests/checkpoints/test_faults.py::test_a_setting_that_is_not_supported_is_named",
    "FG603": "tests/checkpoints/test_faults.py::test_tensors_that_do_not_fit",
    "FG604": "tests/checkpoints/test_faults.py::test_other_files_are_kept",
    "FG605": "tests/checkpoints/test_faults.py::test_an_export_needs_an_import",
    "FG606": "tests/conversion/test_spec.py::test_refusals",
}
"""Codes that no text file in golden/errors can show, and the test that shows each."""


@pytest.mark.parametrize("code", CODES)
def test_code_is_documented_under_its_title(code: str) -> None:
    assert SECTIONS.get(code) == CODES[code]


def test_no_section_documents_a_code_that_is_gone() -> None:
    assert set(SECTIONS) <= set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_code_is_shown_by_a_golden_pair_or_a_test(code: str) -> None:
    if code in WITHOUT_FILE:
        file, name = WITHOUT_FILE[code].split("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {name}(" in text
        assert code in text
    else:
        assert code in SHOWN
