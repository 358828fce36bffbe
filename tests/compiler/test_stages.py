"""Every example, run before and after every pass: equal where it is exact, within its certificate where it is not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgrad_compiler.approximation.certificates import eta, score_factor
from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.ir.flatten import flatten
from fastgrad_compiler.ir.graph import Graph, Node, Program
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_compiler.passes.attention_backward import BLOCK
from fastgrad_compiler.passes.lowrank import rewrite_low_rank
from fastgrad_compiler.pipeline import run as run_pipeline
from fastgrad_compiler.reference.interpret import run, run_gradient
from fastgrad_compiler.reference.operations_torch import TORCH
from fastgrad_compiler.reference.torch_env import Env
from fastgrad_grammar.source import Source
from tests.initial_weights import initial_weights

EXAMPLES = Path(__file__).parents[2] / "examples"
EXACT = ("shapes", "bounds", "attention", "plan", "backward")
ROUNDING = 1e-10  # of float64 sums in another order


@dataclass(frozen=True)
class Example:
    """A file with small parameters, and run-time sizes at which there are far pairs."""

    name: str
    params: tuple[tuple[str, object], ...]
    sizes: tuple[tuple[str, int], ...]

    @property
    def source(self) -> Source:
        """The text of the file."""
        path = EXAMPLES / f"{self.name}.tfg"
        return Source(str(path), path.read_text(encoding="utf-8"))


def example(name: str, sizes: dict[str, int], **params: object) -> Example:
    """With `heads` heads of width 4 unless told."""
    return Example(name, tuple(params.items()), tuple({"b": 2, **sizes}.items()))


CASES = (
    example("bounded", {"n": 19}, depth=2, d_model=16, heads=4, near=4, vocab=11),
    example("llama", {"b": 1, "n": 270}, depth=2, d_model=16, heads=4, kv_heads=2, hidden=24, vocab=11),
    example("bert", {"n": 13}, depth=2, d_model=16, heads=4, context=4096, vocab=11),
    example("vit", {}, depth=2, d_model=16, heads=4, height=24, width=24, patch=2, classes=5),
    example("encoder_decoder", {"b": 1, "m": 9, "n": 150}, depth=2, d_model=16, heads=4, vocab=11),
    example("spelled_out", {"n": 13}, depth=2, d_model=16, heads=4, qk_dim=4, vocab=11),
)
all_examples = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@cache
def stages(case: Example) -> dict[str, Program]:
    """The program as elaborated and after each pass."""
    program = elaborate(case.source, params=dict(case.params))
    return {stage.name: stage.program for stage in run_pipeline(program)}


@cache
def weights(case: Example) -> dict[str, Tensor]:
    """Initial weights, moved away from the zeros and ones that some start from."""
    generator = torch.Generator().manual_seed(7)
    return {
        path: w + 0.1 * torch.randn(w.shape, generator=generator, dtype=torch.float64)
        for path, w in initial_weights(stages(case)["shapes"], 0, torch.float64).items()
    }


def inputs(case: Example, graph: str, skip: int = 0) -> list[Tensor]:
    """Random inputs of a graph, without the first `skip`; ids stay below every vocabulary, a mask hides the end."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for node in stages(case)["shapes"][graph].inputs[skip:]:
        shape = tuple(dim.evaluate(dict(case.sizes)) for dim in node.tensor.shape)
        if node.tensor.dtype == "float":
            found.append(torch.randn(shape, generator=generator, dtype=torch.float64))
        elif node.tensor.dtype == "int":
            found.append(torch.randint(5, shape, generator=generator))
        else:
            found.append((torch.arange(shape[-1]) < shape[-1] - 2).expand(shape))
    return found


def model(case: Example, stage: str, given: dict[str, Tensor]) -> Tensor:
    """What the model gives at a stage, with these weights."""
    program = stages(case)[stage]
    result = run(program, inputs(case, program.main), given)
    assert isinstance(result, Tensor)
    return result


@cache
def output(case: Example, stage: str) -> Tensor:
    """What the model gives at a stage."""
    return model(case, stage, weights(case))


def loss_cotangent(case: Example, stage: str, logits: Tensor) -> Tensor:
    """The cotangent of the model's result that the objective's own backward gives."""
    program = stages(case)[stage]
    objective = str(program.objective)
    one = torch.ones((), dtype=torch.float64)
    result = run(program, [logits, *inputs(case, objective, skip=1), one], {}, graph=f"{objective}.backward")
    assert isinstance(result, Tensor)
    return result


@cache
def gradient(case: Example, stage: str) -> dict[str, Tensor]:
    """Cotangents of the loss for the weights by path and the float inputs by name, by the gradient graph."""
    program = stages(case)[stage]
    g = loss_cotangent(case, stage, output(case, stage))
    of_inputs, of_weights = run_gradient(program, inputs(case, program.main), weights(case), [g])
    return of_inputs | of_weights


def autograd(case: Example, stage: str) -> dict[str, Tensor]:
    """The weights' gradients of the loss by torch, through the interpreter's forward."""
    leaves = {path: w.detach().requires_grad_() for path, w in weights(case).items()}
    program = stages(case)[stage]
    objective = str(program.objective)
    logits = model(case, stage, leaves)
    loss = run(program, [logits, *inputs(case, objective, skip=1)], {}, graph=objective)
    found = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def relative(got: Tensor, expected: Tensor) -> float:
    """The relative L2 distance."""
    return float((got - expected).norm() / expected.norm())


@pytest.mark.sampled(1)
@all_examples
def test_a_pass_before_lowrank_changes_no_result(case: Example) -> None:
    expected = output(case, "elaborate")
    for stage in EXACT:
        torch.testing.assert_close(output(case, stage), expected, rtol=ROUNDING, atol=ROUNDING)


@all_examples
@pytest.mark.parametrize("stage", ["backward", "lowrank"])
def test_the_gradient_graph_is_the_gradient_of_its_stage(case: Example, stage: str) -> None:
    expected, got = autograd(case, stage), gradient(case, stage)
    assert expected.keys() <= got.keys()
    for path, g in expected.items():
        assert torch.allclose(got[path], g, rtol=1e-8, atol=1e-10), path


@pytest.mark.medium
@all_examples
def test_every_stage_survives_its_text(case: Example) -> None:
    for program in stages(case).values():
        assert parse_program(print_program(program)) == program


@cache
def attentions(case: Example) -> list[tuple[Node, list[Tensor]]]:
    """Each attention that the plan serves by a polynomial, with the operands that it has in the exact model."""
    program = stages(case)["plan"]
    flat = flatten(program)
    served = [node for node in flat.nodes if node.op == "attention" and node["decision"] == "polynomial"]
    found = []
    for node in served:
        probe = replace(
            program, graphs=(replace(flat, name="probe", outputs=node.inputs),), main="probe", objective=None
        )
        operands = run(probe, inputs(case, program.main), weights(case))
        assert isinstance(operands, tuple)
        found.append((node, list(operands)))
    return found


def per_query_head(shared: Tensor, q: Tensor) -> Tensor:
    """Keys or values, repeated for the query heads that share them."""
    return shared.repeat_interleave(q.shape[-3] // shared.shape[-3], -3)


@all_examples
def test_each_attention_stays_within_its_certificate(case: Example) -> None:
    """docs/mathematics.md, section 7: each column is off by at most eta/2 of the range of its values."""
    env = Env(dict(case.sizes), torch.float64, torch.device("cpu"))
    served = attentions(case)
    assert served
    for node, operands in served:
        one = replace(stages(case)["plan"], graphs=(Graph("one", (node,), ()),))
        (rewritten,) = rewrite_low_rank(one).graphs[0].nodes
        exact, rough = (TORCH[n.op](n, operands, env) for n in (node, rewritten))
        assert isinstance(exact, Tensor)
        assert isinstance(rough, Tensor)
        v = per_query_head(operands[2], exact)
        spread = v.amax(-2, keepdim=True) - v.amin(-2, keepdim=True)
        share = ((exact - rough).abs() / spread).max()
        assert 0 < share <= eta(float(str(node["eps"]))) / 2


@all_examples
def test_each_attention_backward_stays_within_its_certificate(case: Example) -> None:
    """docs/mathematics.md, section 7, of the exact graph and the node that replaces it.

    sum_j ||dV~_j - dV_j|| <= eta sum_i ||dO_i||, over the query heads that share v; and, since dQ_i = scale dS_i K,
    ||dQ~_i - dQ_i|| <= scale * (the factor of dS) * omega_i * max_j ||k_j||.
    """
    env = Env(dict(case.sizes), torch.float64, torch.device("cpu"))
    program = stages(case)["backward"]
    for node, operands in attentions(case):
        exact_graph = next(
            g for g in program.graphs if g.block == BLOCK and attributes_of(g) == node.attributes
        )
        call = Node("call", "call", exact_graph.outputs, (("graph", exact_graph.name), ("label", "c")))
        one = program.with_graphs((exact_graph, Graph("one", (call,), ())))
        (rewritten,) = rewrite_low_rank(one).graphs[0].nodes
        q, k, v = operands[:3]
        g = torch.randn(
            (*q.shape[:-1], v.shape[-1]), dtype=torch.float64, generator=torch.Generator().manual_seed(5)
        )
        exact = run(program, [*operands, g], {}, graph=exact_graph.name)
        rough = TORCH[rewritten.op](rewritten, [*operands, g], env)
        eps, eps_prime = float(str(node["eps"])), float(str(node["eps_prime"]))

        off = (rough[2] - exact[2]).norm(dim=-1).sum(-1)
        given = g.norm(dim=-1).sum(-1).unflatten(-1, (v.shape[-3], -1)).sum(-1)
        assert (off <= eta(eps) * given).all()

        pulled = g @ per_query_head(v, q).mT
        omega = pulled.amax(-1) - pulled.amin(-1)
        reach = float(str(node["scale"])) * per_query_head(k, q).norm(dim=-1).amax(-1, keepdim=True)
        off = (rough[0] - exact[0]).norm(dim=-1)
        assert (off <= score_factor(eps, eps_prime) * omega * reach).all()
        assert off.any()


def attributes_of(backward: Graph) -> object:
    """The attributes of the attention that a graph is the backward of."""
    return next(node.attributes for node in backward.nodes if node.op == "attention")


@all_examples
def test_the_whole_model_stays_within_the_budget_of_its_file(case: Example) -> None:
    """The file asks for relative L2 errors of at most 0.1 of the output and 0.25 of every weight's gradient."""
    budget = stages(case)["plan"].budget
    assert budget is not None
    assert budget.output is not None
    assert budget.gradient is not None
    assert 0 < relative(output(case, "lowrank"), output(case, "backward")) <= budget.output
    exact, rough = gradient(case, "backward"), gradient(case, "lowrank")
    for path in weights(case):
        assert relative(rough[path], exact[path]) <= budget.gradient, path
