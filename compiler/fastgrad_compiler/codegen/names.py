"""Python names for what a program names: classes for blocks, variables for nodes, attributes for labels."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection

from fastgrad_compiler.ir.masks import GATED, MASKS
from fastgrad_grammar.quote import python_string

# What the generated module itself uses; a variable of the user's of that name gets an underscore after it.
HELPERS = frozenset(
    {
        "BufferDict",
        "BufferList",
        "alibi_bias",
        "apply_alibi",
        *(f"apply_{name}" for name in (*MASKS, *GATED)),
        "apply_near_far",
        "apply_polynomial",
        "causal_mask",
        "centred_layer_norm",
        "check_dim",
        "check_shape",
        "depthwise",
        "document_mask",
        "entries",
        "entry",
        "linear_cross_entropy",
        "masked_softmax",
        "normalize_rows",
        "padding_mask",
        "recomputed",
        "rotary",
        "shift",
        "sinusoid",
        "softmax_attention",
        "truncate",
        "window_mask",
    }
)
MODULE_NAMES = frozenset(
    {
        "F",
        "Generated",
        "Guard",
        "Tensor",
        "budget_status",
        "math",
        "name_guards",
        "nn",
        "refuse_pieces",
        "row_kernel",
        "torch",
    }
    | {
        "Rule",
        "Scope",
        "State",
        "StepKernel",
        "Stepped",
        "attention_step",
        "depthwise_step",
        "memory_step",
        "place_of",
        "rotary_step",
        "rows_of",
    }
    | {"shift_step"}
)
LOCAL_NAMES = (
    HELPERS | MODULE_NAMES | {"MODEL", "exact_attention", "initialise", "like", "range", "self", "state"}
)
CLASS_NAMES = HELPERS | MODULE_NAMES | {"ClassVar", "False", "None", "True"}
_NUMBERED = re.compile(r"(.+?)_\d+")
# What nn.Module has, written down so that files neither need a PyTorch to be made nor depend on which it is.
_OF_MODULE = """
    T_destination _apply _backward_hooks _backward_pre_hooks _buffers _call_impl _compiled_call_impl
    _forward_hooks _forward_hooks_always_called _forward_hooks_with_kwargs _forward_pre_hooks
    _forward_pre_hooks_with_kwargs _get_backward_hooks _get_backward_pre_hooks _get_name _is_full_backward_hook
    _load_from_state_dict _load_state_dict_post_hooks _load_state_dict_pre_hooks
    _maybe_warn_non_full_backward_hook _modules _named_members _non_persistent_buffers_set _parameters
    _register_load_state_dict_pre_hook _register_state_dict_hook _replicate_for_data_parallel _save_to_state_dict
    _slow_forward _state_dict_hooks _state_dict_pre_hooks _version _wrapped_call_impl add_module apply bfloat16
    buffers call_super_init children compile cpu cuda double dump_patches eval extra_repr float forward get_buffer
    get_extra_state get_parameter get_submodule half ipu load_state_dict modules mtia named_buffers named_children
    named_modules named_parameters parameters register_backward_hook register_buffer register_forward_hook
    register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook
    register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module register_parameter
    register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule
    share_memory state_dict to to_empty train training type xpu zero_grad
"""
MODULE_ATTRIBUTES = frozenset(_OF_MODULE.split()) | {
    *("INIT", "KERNEL", "STEP", "budget_status", "load_state", "loss", "reset_parameters", "start", "step"),
}


def class_name(block: str, taken: Collection[str]) -> str:
    """`std.rms_norm` is RmsNorm, `gpt` is Gpt; the second class of a block has a 2 after its name."""
    parts = block.rpartition(".")[2].split("_")
    stem = "".join(part[:1].upper() + part[1:] for part in parts if part) or "Block"
    number, name = 1, stem
    while name in taken or name in CLASS_NAMES:
        number += 1
        name = f"{stem}{number}"
    return name


def variable(name: str) -> str:
    """A valid Python identifier close to `name` that hides nothing the module needs."""
    text = re.sub(r"\W", "_", name.lstrip("_"), flags=re.ASCII) or "value"
    if text[0].isdigit():
        text = f"_{text}"
    reserved = keyword.iskeyword(text) or text in LOCAL_NAMES or text.startswith("polynomial_attention")
    return f"{text}_" if reserved else text


def member_access(label: str, kind: str, owner: str = "self") -> str:
    """`self.label`; where Python or nn.Module knows another thing by that name, its entry among the members."""
    usual = label.isidentifier() and not keyword.iskeyword(label) and not label.startswith("__")
    if not usual or label in MODULE_ATTRIBUTES:
        return f"{owner}._{kind}s[{python_string(label)}]"
    return f"{owner}.{label}"


def base(name: str, others: Collection[str]) -> str:
    """The user's name of a node: `x` for `x_2`, where `x` is a node too (a name bound again is numbered)."""
    found = _NUMBERED.fullmatch(name)
    return found.group(1) if found and found.group(1) in others else name
