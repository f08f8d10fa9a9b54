"""Every way to write a linear becomes one form, with the same numbers, quantized and adapted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import qlora_fx
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from peft import LoraConfig
from qlora_fx.compiler import printer
from qlora_fx.config import Config
from qlora_fx.errors import ConfigError
from qlora_fx.passes.graph.nodes import CANONICAL
from qlora_fx.passes.graph.site import Layout
from qlora_fx.passes.normalize import normalize
from qlora_fx.testing.check import bisect, check, compare, randomize_adapter
from slow import only_slow_but
from small_models import captured
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

LORA: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


class Holder(nn.Module):
    """Runs ``fn(x, *parameters)``; the parameters belong to a module that is no linear."""

    def __init__(self, fn: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace()
        self.held = nn.Module()
        self.fn = fn
        for i, shape in enumerate(shapes):
            self.held.register_parameter(f"w{i}", nn.Parameter(torch.randn(*shape) * 0.3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.fn(x, *self.held.parameters())}


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, 8)


def heads(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], 2, 4)


def four(x: Tensor) -> Tensor:
    return flat(x).expand(4, -1, -1)


def ids(x: Tensor) -> Tensor:
    """Expert 2 or 3 for each row: 0 and 1 get none."""
    return (flat(x)[:, 0] > 0).long() + 2


SPELLINGS: dict[str, tuple[Any, ...]] = {
    "matmul": (lambda x, w: x @ w, (8, 6)),
    "matmul with a transposed weight": (lambda x, w: x @ w.T, (6, 8)),
    "matmul with a permuted weight": (lambda x, w: x @ w.permute(1, 0), (6, 8)),
    "mm": (lambda x, w: torch.mm(flat(x), w), (8, 6)),
    "weight on the left": (lambda x, w: w @ x.transpose(1, 2), (6, 8)),
    "linear of the weight": (lambda x, w: F.linear(w, flat(x)), (6, 8)),
    "mv": (lambda x, w: torch.mv(w, x.mean((0, 1))), (6, 8)),
    "einsum": (lambda x, w: torch.einsum("bsd,od->bso", x, w), (6, 8)),
    "einsum without an arrow": (lambda x, w: torch.einsum("bsd,od", x, w), (6, 8)),
    "einsum into heads": (lambda x, w: torch.einsum("bsd,dhk->bshk", x, w), (8, 3, 5)),
    "einsum with dots and a permutation": (
        lambda x, w: torch.einsum("...d,hdk->...hk", x, w),
        (3, 8, 5),
    ),
    "einsum out of heads": (lambda x, w: torch.einsum("bshk,hkd->bsd", heads(x), w), (2, 4, 6)),
    "einsum per head": (lambda x, w: torch.einsum("bshk,hkd->bshd", heads(x), w), (2, 4, 6)),
    "addmm with factors": (
        lambda x, w, b: torch.addmm(b, flat(x), w, alpha=2.0, beta=0.5),
        (8, 6),
        (6,),
    ),
    "bmm with a stack": (lambda x, w: torch.bmm(four(x), w), (4, 8, 6)),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b, four(x), w), (4, 8, 6), (4, 1, 6)),
    "a loop over a stack": (
        lambda x, w: torch.stack([F.linear(x, w[i]) for i in range(4)]),
        (4, 6, 8),
    ),
    "a loop over a stack, transposed": (
        lambda x, w: torch.stack([x @ w[i] for i in range(4)]),
        (4, 8, 6),
    ),
    "matrices under each other": (
        lambda x, w: torch.stack([x @ w.view(4, 8, 6)[i] for i in range(4)]),
        (32, 6),
    ),
    "a gathered stack": (
        lambda x, w: torch.bmm(w[ids(x)], flat(x).unsqueeze(-1)).squeeze(-1),
        (4, 6, 8),
    ),
    "a gathered stack, transposed": (
        lambda x, w: torch.bmm(flat(x).unsqueeze(1), w[ids(x)]).squeeze(1),
        (4, 8, 6),
    ),
    "a convolution of width one, every argument given": (
        lambda x, w: torch.convolution(x.mT, w, None, [1], [0], [1], False, [0], 1).mT,
        (6, 8, 1),
    ),
    "rows of a fused weight": (lambda x, w: F.linear(x, w[:6]) * F.linear(x, w[6:]), (12, 8)),
    "rows of a fused weight, by einsum": (
        lambda x, w: torch.einsum("bsd,od->bso", x, w[:6]) * (w[6:] @ x.mT).mT,
        (12, 8),
    ),
    "columns of a fused weight": (lambda x, w: torch.cat([x @ c for c in w.chunk(2, 1)]), (8, 12)),
    "a weight and its transpose": (
        lambda x, w: F.linear(torch.relu(F.linear(x, w)), w.T),
        (6, 8),
    ),
    "called twice": (lambda x, w: F.linear(torch.relu(F.linear(x, w)), w), (8, 8)),
    "behind casts and clamps": (
        lambda x, w: F.linear(x.clamp(-1, 1), w.double().float()).clamp(-5, 5),
        (6, 8),
    ),
}


def inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_is_quantized_and_adapted_with_the_right_numbers(spelling: str) -> None:
    fn, *shapes = SPELLINGS[spelling]
    model = Holder(fn, *shapes)
    qmodel = qlora_fx.transform(
        copy.deepcopy(model), LoraConfig(**LORA), backend="eager", example_inputs=inputs()
    )
    randomize_adapter(qmodel)
    report = compare(model, qmodel, inputs())
    assert report.passed, str(report)
    stages = bisect(model, qmodel, inputs()).values()
    assert max(*stages, report.worst_output, report.worst_gradient) < 1e-5, str(report)
    assert min(line.norm for line in report.sites) > 0
    (row,) = qmodel.explain()
    assert (row.quantized, row.adapted, row.reason) == (True, True, "")


@pytest.mark.parametrize(
    ("spelling", "a", "b"),
    [
        ("a loop over a stack", (4 * 2, 8), (6, 4 * 2)),
        # [in, out], which PEFT takes for [out, in].
        ("a loop over a stack, transposed", (4 * 2, 6), (8, 4 * 2)),
        ("rows of a fused weight", (2, 8), (12, 2)),
    ],
)
def test_every_matrix_of_a_stack_has_factors_of_its_own(
    spelling: str, a: tuple[int, int], b: tuple[int, int]
) -> None:
    fn, *shapes = SPELLINGS[spelling]
    qmodel = qlora_fx.transform(
        Holder(fn, *shapes), LoraConfig(**LORA), backend="eager", example_inputs=inputs()
    )
    assert [tuple(v.shape) for v in qmodel.adapter_state_dict().values()] == [a, b]


@pytest.mark.parametrize(
    "spelling",
    only_slow_but(
        ["a gathered stack"],
        ["einsum into heads", "baddbmm", "a gathered stack", "rows of a fused weight"],
    ),
)
def test_a_spelling_is_right_when_compiled(spelling: str) -> None:
    fn, *shapes = SPELLINGS[spelling]
    report = check(Holder(fn, *shapes), inputs(), LoraConfig(**LORA), quiet=True)
    assert report.passed, str(report)


def test_normalize_does_nothing_the_second_time(config: Config) -> None:
    for name, (fn, *shapes) in SPELLINGS.items():
        gm = captured(Holder(fn, *shapes), inputs()).gm
        first = normalize(gm, config=config)
        assert first.modified or name == "called twice", name
        assert any(n.target in CANONICAL for n in gm.graph.nodes), name
        before = printer.text(gm)
        assert not normalize(gm, config=config).modified, name
        assert printer.text(gm) == before


def test_einsum_becomes_one_linear(config: Config) -> None:
    gm = captured(Holder(*SPELLINGS["einsum into heads"]), inputs()).gm
    assert_expected_inline(
        printer.text(normalize(gm, config=config).graph_module),
        """\
def Holder(%x: f32[B, S, 8]):
    %held_w0: f32[8, 3, 5] = stored[held.w0]
    %held_w0_matrix: f32[3, 5, 8] = aten.permute(%held_w0, [1, 2, 0])
    %held_w0_matrix_1: f32[15, 8] = aten.reshape(%held_w0_matrix, [15, 8])
    %einsum_size_b: int(B) = aten.sym_size(%x, 0)
    %einsum_size_s: int(S) = aten.sym_size(%x, 1)
    %einsum_1: f32[B, S, 15] = aten.linear(%x, %held_w0_matrix_1)
    %einsum_unfold: f32[B, S, 3, 5] = aten.reshape(%einsum_1, [%einsum_size_b, %einsum_size_s, 3, 5])
    return (%einsum_unfold)
""",
    )


def test_a_stack_becomes_a_grouped_linear(config: Config) -> None:
    gm = captured(Holder(*SPELLINGS["bmm with a stack"]), inputs()).gm
    assert_expected_inline(
        printer.text(normalize(gm, config=config).graph_module),
        """\
def Holder(%x: f32[B, S, 8]):
    %held_w0: f32[4, 8, 6] = stored[held.w0]
    %reshape: f32[B*S, 8] = aten.reshape(%x, [-1, 8])
    %expand: f32[4, B*S, 8] = aten.expand(%reshape, [4, -1, -1])
    %held_w0_matrix: f32[4, 6, 8] = aten.permute(%held_w0, [0, 2, 1])
    %bmm_size_n: int(B*S) = aten.sym_size(%expand, 1)
    %bmm_rows: f32[4*B*S, 8] = aten.reshape(%expand, [-1, 8])
    %bmm_groups: i64[4] = aten.arange.start(1, 5, dtype=i64, device=cpu)
    %bmm_ends: i64[4] = aten.mul(%bmm_groups, %bmm_size_n)
    %bmm_1: f32[4*B*S, 6] = qlora_fx.grouped_linear(%bmm_rows, %held_w0_matrix, %bmm_ends)
    %bmm_unfold: f32[4, B*S, 6] = aten.reshape(%bmm_1, [4, %bmm_size_n, 6])
    return (%bmm_unfold)
""",
    )


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.point = nn.Conv2d(8, 6, 1)
        self.grouped = nn.Conv2d(6, 6, 1, groups=2)
        self.one = nn.Conv1d(6, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.one(self.grouped(self.point(self.patch(x))).flatten(2))}


def test_convolutions_of_width_one_are_linears_and_others_say_why_not() -> None:
    batch = {"x": torch.randn(2, 3, 8, 8)}
    report = check(Convolutions(), batch, LoraConfig(**LORA), backend="eager", quiet=True)
    assert report.passed, str(report)
    qmodel = qlora_fx.transform(
        Convolutions(), LoraConfig(**LORA), backend="eager", example_inputs=batch
    )
    rows = {row.name: row for row in qmodel.explain()}
    assert rows["point"].quantized
    assert rows["point"].adapted
    assert rows["one"].adapted
    assert rows["patch"].reason == "convolutions stay dense (window 2x2)"
    assert rows["grouped"].reason == "convolutions stay dense (window 1x1, in groups)"
    assert {k: tuple(v.shape) for k, v in qmodel.adapter_state_dict().items() if "point" in k} == {
        "base_model.model.point.lora_A.weight": (2, 8, 1, 1),
        "base_model.model.point.lora_B.weight": (6, 2, 1, 1),
    }


def test_packed_attention_weights_are_found() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.config = SimpleNamespace()
            self.before = nn.Linear(8, 8)
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y, _ = self.mix(self.before(x), x, x, need_weights=False)
            return {"y": y}

    report = check(Attention(), inputs(), LoraConfig(**LORA), backend="eager", quiet=True)
    assert report.passed, str(report)
    assert {line.name for line in report.sites} == {"before", "mix.in_proj_weight", "mix.out_proj"}


UNKNOWN: dict[str, tuple[Any, ...]] = {
    "multiplied and summed": (lambda x, w: (x.unsqueeze(-2) * w).sum(-1), (6, 8)),
    "bilinear": (lambda x, w: F.bilinear(x, x, w), (6, 8, 8)),
    "three factors": (lambda x, w: torch.einsum("bsd,bsd,od->bso", x, x, w), (6, 8)),
    "a computed weight": (lambda x, w: F.linear(x, torch.tanh(w)), (6, 8)),
}


@pytest.mark.parametrize("form", UNKNOWN)
def test_a_form_nobody_handles_is_reported_and_warned_of_once(form: str) -> None:
    fn, *shapes = UNKNOWN[form]

    class Planted(Holder):
        def __init__(self) -> None:
            super().__init__(fn, *shapes)
            self.plain = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return super().forward(self.plain(x))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qmodel = qlora_fx.transform(
            Planted(), LoraConfig(**LORA), backend="eager", example_inputs=inputs()
        )
        qmodel(**inputs())
        qmodel.eval()(**inputs())
    mine = [str(w.message) for w in caught if "held" in str(w.message)]
    assert len(mine) == 1, mine
    assert "stays dense and unadapted" in mine[0]
    rows = {row.name: row for row in qmodel.explain()}
    assert rows["plain"].quantized
    (planted,) = (row for row in rows.values() if row.weight == "held.w0")
    assert not planted.quantized
    assert not planted.adapted
    assert planted.reason
    assert planted.flops_share > 0


def test_a_buffer_is_no_weight(config: Config) -> None:
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace()
            self.plain = nn.Linear(8, 8)
            self.register_buffer("rotation", torch.eye(8))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.plain(x) @ self.rotation}

    qmodel = qlora_fx.transform(
        Rotated(), LoraConfig(**LORA), backend="eager", example_inputs=inputs()
    )
    assert [row.name for row in qmodel.explain()] == ["plain"]


def test_a_target_that_cannot_be_adapted_says_why() -> None:
    batch = {"x": torch.randn(2, 3, 8, 8)}
    lora = LoraConfig(r=2, target_modules=["patch", "one"])
    with pytest.raises(ConfigError, match=r"'patch' names patch, which cannot be adapted: conv"):
        qlora_fx.transform(Convolutions(), lora, backend="eager", example_inputs=batch)


def test_a_weight_that_one_reader_needs_dense_is_dense_for_all() -> None:
    class Borrowed(nn.Module):
        """``own`` runs, and someone else multiplies by its weight."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.config = SimpleNamespace()
            self.own, self.plain = nn.Linear(8, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.plain(self.own(x)) + F.linear(x, self.own.weight)}

    report = check(Borrowed(), inputs(), LoraConfig(**LORA), backend="eager", quiet=True)
    assert report.passed, str(report)
    for skip, quantized in (([], True), (["own"], False)):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip or None
        )
        qmodel = qlora_fx.transform(
            Borrowed(),
            LoraConfig(**LORA),
            quantization,
            compute_dtype=torch.float32,
            backend="eager",
            example_inputs=inputs(),
        )
        qmodel(**inputs())
        assert {row.quantized for row in qmodel.explain() if row.weight == "own.weight"} == {
            quantized
        }
        reader = next(r for r in qmodel.explain() if "read by" in r.name)
        assert "PEFT adapts the module that owns the weight" in reader.reason


def test_a_layout_and_its_inverse() -> None:
    values = torch.arange(2 * 3 * 5)
    for permute, shape in (((0, 1, 2), (6, 5)), ((2, 0, 1), (5, 6)), ((1, 0, 2), (3, 2, 5))):
        layout = Layout((2, 3, 5), permute, shape)
        assert layout.of(values).shape == shape
        assert torch.equal(layout.inverse(layout.of(values)).reshape(-1), values)
