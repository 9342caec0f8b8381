"""What every decoder of `DECODERS` must do, on toy worlds of each kind and the native model; a
decoder is tested by being registered.

It ends within its bound; it fills masked cells alone and changes only what the sampler wrote; a
row's text does not depend on the other rows; its slow end is what it declares; parameters out of
range are refused by name; and planted faults are caught. A world whose model does not take a
decoder is shown as skipped, with the refusal; a decoder that every world skips fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bdlm.core import forward
from bdlm.core.blockmap import Contiguous
from bdlm.core.errors import BdlmError, ConfigError, DecoderError
from bdlm.core.types import Canvas, Commit, Denoiser, ModelSpec
from bdlm.generation.decoders import DECODERS, Decoder, View, make_decoder
from bdlm.generation.decoders.learned import Indicator, save_indicator
from bdlm.generation.engine.engine import Engine, generate
from bdlm.generation.sampling.noise import CellNoise
from bdlm.generation.sampling_params import RequestOutput, SamplingParams, check_fits
from bdlm.models.toy import TOYS, Inconsistent, JointTable, toy_spec
from tests.contracts.builders import randomised, tiny_dit
from tests.generation.worlds import FALSE_ALARM, same_distribution


def native(algo: str) -> Denoiser:
    """The tiny transformer in float64 with random weights, its head centred: no token wins
    everywhere, a cell depends on its neighbours."""
    model = randomised(tiny_dit(algo), std=0.5)
    head: Any = model.backbone.output_layer
    with torch.no_grad():
        for parameter in head.adaLN_modulation.parameters():
            parameter.zero_()
        head.norm_final.weight.fill_(1.0)
        head.linear.weight.mul_(4.0)
        head.linear.bias.zero_()
        canvases = torch.randint(0, 10, (64, 4), generator=torch.Generator().manual_seed(1))
        head.linear.bias.sub_(predicted(model.double(), canvases).mean((0, 1)))
    return model  # type: ignore[return-value]


def predicted(model: Any, ids: Tensor) -> Tensor:
    """Logits [R, 3, V] of a text's first cells when the first of each row of ids, int64 [R, 4], is
    given and the rest are masked."""
    masked = (torch.arange(4) > 0).expand_as(ids)
    layout = forward.layout_at(Contiguous(model.spec.block_size), torch.arange(4).expand_as(ids))
    with torch.no_grad():
        out = forward.predict(
            model, Canvas(torch.where(masked, model.spec.mask_id, ids), masked, layout), cache=None
        )
    assert out.logits is not None
    return out.logits.view(len(ids), 3, -1)


WORLDS: dict[str, Any] = {
    "inconsistent": lambda: Inconsistent(toy_spec(4, 16)),
    "shifted": lambda: Inconsistent(replace(toy_spec(4, 16), shift=True)),
    "score": lambda: Inconsistent(
        replace(toy_spec(12, 12), streams=1, prediction="log_score", time_conditioned=True)
    ),
    "autoregressive": lambda: Inconsistent(
        replace(toy_spec(1, 16), noise="none", shift=True, context="causal", streams=1), spread=3.0
    ),
    "native": lambda: native("bd3lm"),
    "native_whole": lambda: native("mdlm"),
}
# besides the defaults: settings at which small worlds take several cells a forward pass
KNOBS: dict[str, list[dict[str, Any]]] = {
    "ancestral": [{"steps": 2, "schedule": "cosine"}],
    "fixed-k": [
        {"k": 1, "score": "margin"},
        {"k": 1, "score": "entropy"},
        {"k": 1, "score": "random"},
    ],
    "threshold": [{"tau": 0.4}, {"tau": 0.3, "score": "margin"}],
    "factor": [{"f": 2.0}],
    "eb": [{"gamma": 1.5}],
    "klass": [{"conf": 0.3, "kl": 2.0, "history": 1}],
    "localleap": [{"tau": 0.6, "relaxed": 0.3, "radius": 1}],
    "dilated": [{"stride": 2}],
    "interleaved": [{"gap": 2}],
    "spaced": [{"k": 2, "gap": 3}, {"k": 4, "score": "entropy"}],
    "swd": [{"tau": 0.4, "lam": 1.0}],
    "attention": [{"conf": 0.3}],
    "adablock": [{"delimiters": (1,), "tau": 0.4, "tau_end": 0.2}],
    "credit": [{"tau": 0.4}],
    "remdm": [
        {"steps": 6, "eta": 0.6},
        {"steps": 6, "eta": 0.6, "kind": "rescale"},
        {"steps": 6, "eta": 0.6, "kind": "conf"},
    ],
    "edit": [{"tau_mask": 0.4, "tau_edit": 0.35}],
    "soft": [{"tau": 0.3, "done": 0.6}],
}
PROMPTS = ([1], [2, 0, 1, 1, 0], [0, 2, 1, 1])


def settings(name: str) -> list[Decoder]:
    return [make_decoder(name, options) for options in ({}, *KNOBS.get(name, []))]


@pytest.fixture(scope="module", autouse=True)
def indicator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The file that `ni` reads: an indicator for the native worlds (16 wide, 11 tokens), made by
    hand to accept even tokens."""
    path = str(tmp_path_factory.mktemp("ni") / "indicator.safetensors")
    net = Indicator(state=16, vocab=11)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        # a token's parity goes through `join`, past the layers, to `out`
        net.tokens.weight[:, 0] = 1 - 2 * (torch.arange(11) % 2)
        # the first coordinate of the candidate, before its three rivals
        net.join.weight[0, -4 * net.tokens.embedding_dim] = 1.0
        net.out.weight[0, 0] = 5.0
    save_indicator(net, path)
    KNOBS["ni"] = [{"indicator": path, "accept": 0.5, "conf": 1.0}]
    yield path
    del KNOBS["ni"]


def refusal(decoder: Decoder, model: Denoiser) -> str:
    """Why a model does not take this decoder, one line; empty if it does."""
    try:
        check_fits(SamplingParams(max_new_tokens=1, decoder=decoder), [0], model.spec)
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def fits(decoder: Decoder, model: Denoiser) -> bool:
    return not refusal(decoder, model)


def fitting(decoders: list[Decoder], model: Denoiser) -> list[Decoder]:
    """Those of a decoder's settings that the model takes; skips the test, with the last refusal, if
    it takes none."""
    taken = [p for p in decoders if fits(p, model)]
    return taken or pytest.skip(refusal(decoders[-1], model))


def nowhere_asserted(decoders: dict[str, list[Decoder]]) -> list[str]:
    """Names of decoders that no world takes, by whose settings."""
    models = [make() for make in WORLDS.values()]
    return [
        name
        for name, own in decoders.items()
        if not any(fits(p, model) for model in models for p in own)
    ]


def params(decoder: Decoder, row: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=(7, 5, 8)[row], decoder=decoder, seed=10 + row, **more)


@dataclass(frozen=True)
class Watched(Decoder):
    """A decoder under watch: every decision is held against the rules, independently of the checks
    of the block_state."""

    inner: Decoder = field(default_factory=Decoder)
    mask_id: int = -1

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs

    def bound(self, block: int) -> int:
        return self.inner.bound(block)

    def plan(self, masked: Tensor, noise: CellNoise) -> Tensor | None:
        cells = self.inner.plan(masked, noise)
        assert cells is None or not bool((cells & ~masked).any()), (
            "planned a cell that is not masked"
        )
        return cells

    def choose(self, view: View) -> Commit:
        commit = self.inner.choose(view)
        nothing = torch.zeros_like(view.masked)
        overwrite = nothing if commit.overwrite is None else commit.overwrite
        reopen = nothing if commit.reopen is None else commit.reopen
        assert not bool((commit.cells & ~view.masked).any()), "filled a cell that is not masked"
        assert not bool(((overwrite | reopen) & ~view.filled).any()), (
            "changed a cell that it had not filled"
        )
        written = commit.ids[commit.cells | overwrite]
        assert not bool((written == self.mask_id).any()), "wrote the mask token"
        cells = (view.masked | view.filled).sum(1)
        for row in cells.nonzero().flatten().tolist():
            assert int(view.step[row]) < self.inner.bound(view.masked.shape[1]), (
                "took more decisions than its bound"
            )
        return commit


def finishes(model: Denoiser, decoder: Decoder, row: int) -> RequestOutput:
    """One text under watch, in at most as many forward passes as the bound allows."""
    spec, own = model.spec, params(Watched(decoder, model.spec.mask_id), row)
    engine = Engine(model, 1, drafts=True)
    engine.submit(PROMPTS[row], own)
    whole = spec.streams == 1 and spec.noise != "none"
    blocks = 1 if whole else own.max_new_tokens
    most = 1 + blocks * decoder.bound(
        len(PROMPTS[row]) + own.max_new_tokens if whole else spec.block_size
    )
    given = (
        PROMPTS[row]
        if whole
        else PROMPTS[row][len(PROMPTS[row]) // spec.block_size * spec.block_size :]
    )
    for _ in range(most):
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.result is not None:
                return event.result
            if event.kind == "draft" and given:
                assert event.ids[: len(given)] == list(given), "a given cell changed"
            elif event.kind == "commit":
                given = []
    raise AssertionError("took more calls than its bound")


def alone_and_in_company(model: Denoiser, decoders: list[Decoder]) -> None:
    """Rows under different decoders, in one engine of fewer rows than texts, write what each writes
    alone."""
    requests = [(PROMPTS[i % 3], params(p, i % 3)) for i, p in enumerate(decoders)]
    alone = [generate(model, [prompt], [own])[0].token_ids for prompt, own in requests]
    together = generate(
        model,
        [prompt for prompt, _ in requests],
        [own for _, own in requests],
        max_num_seqs=max(2, len(decoders) - 1),
    )
    assert [r.token_ids for r in together] == alone, "a text depends on its neighbours"


def slow_end_is_its_reference(model: Denoiser, decoder: Decoder) -> None:
    slow, reference = decoder.slowest(), decoder.reference()
    if decoder.equality == "tokens":
        texts = [
            [
                r.token_ids
                for r in generate(
                    model, PROMPTS, [params(p, i, temperature=(1.0, 0.0, 0.7)[i]) for i in range(3)]
                )
            ]
            for p in (slow, reference)
        ]
        assert texts[0] == texts[1], "the slow end differs from the reference"


@pytest.fixture(scope="module", params=WORLDS)
def model(request: pytest.FixtureRequest) -> Iterator[Denoiser]:
    yield WORLDS[request.param]()


@pytest.mark.parametrize("name", DECODERS)
def test_ends_within_its_bound_and_touches_only_what_it_may(model: Denoiser, name: str) -> None:
    for i, decoder in enumerate(fitting(settings(name), model)):
        for row in range(2 if i else 1):
            result = finishes(model, decoder, row)
            assert len(result.token_ids) == params(decoder, row).max_new_tokens
            assert all(
                0 <= t < model.spec.vocab_size and t != model.spec.mask_id for t in result.token_ids
            )


@pytest.mark.parametrize("name", DECODERS)
def test_a_row_does_not_depend_on_its_neighbours(model: Denoiser, name: str) -> None:
    (decoder,) = fitting(settings(name)[-1:], model)
    others = [
        p
        for p in (make_decoder("first-hitting"), make_decoder("threshold", {"tau": 0.4}))
        if fits(p, model)
    ]
    alone_and_in_company(model, [decoder, decoder, *others, decoder])


def test_all_decoders_in_one_engine(model: Denoiser) -> None:
    alone_and_in_company(
        model, [p for name in DECODERS for p in settings(name)[-1:] if fits(p, model)]
    )


@pytest.mark.parametrize("name", [n for n in DECODERS if DECODERS[n].equality == "tokens"])
def test_the_slow_end_is_its_reference_in_tokens(model: Denoiser, name: str) -> None:
    for decoder in fitting(settings(name), model):
        assert refusal(decoder.slowest(), model) == ""
        assert refusal(decoder.reference(), model) == ""
        slow_end_is_its_reference(model, decoder)


@pytest.mark.parametrize("name", [n for n in DECODERS if DECODERS[n].equality == "distribution"])
def test_the_slow_end_is_its_reference_in_distribution(name: str) -> None:
    table = JointTable.random(replace(toy_spec(4), streams=1), seed=8)
    decoder = settings(name)[:2][-1]  # its first setting for small worlds, if it has one
    slow, reference = (
        [
            r.token_ids
            for r in generate(
                table,
                [[1]] * 1500,
                SamplingParams(max_new_tokens=3, decoder=p, seed=s),
                max_num_seqs=100,
            )
        ]
        for p, s in ((decoder.slowest(), 0), (decoder.reference(), 10**6))
    )
    assert same_distribution(slow, reference) > FALSE_ALARM


def test_texts_of_a_world_vary_and_depend_on_what_stands_before(model: Denoiser) -> None:
    """Else equal texts would prove nothing: a model that always writes one token passes every
    comparison."""
    own = [params(make_decoder("first-hitting"), 2, temperature=t) for t in (0.0, 0.0, 0.0, 1.0)]
    texts = [r.token_ids for r in generate(model, [[1], [2], [0], [1]], own)]
    assert len({tuple(text) for text in texts}) >= 3
    assert len({token for text in texts for token in text}) >= 3


def test_every_decoder_is_asserted_in_some_world() -> None:
    @dataclass(frozen=True)
    class FitsNowhere(Decoder):
        def check(self, block: int, spec: ModelSpec) -> None:
            raise ConfigError("fits no model")

    registered = {name: settings(name) for name in DECODERS}
    assert nowhere_asserted(registered) == []
    assert nowhere_asserted({**registered, "planted": [FitsNowhere()]}) == ["planted"]


def test_every_setting_is_asserted_in_some_world() -> None:
    """A setting that no model takes proves nothing; only `ni` without a file is such by intent."""
    each = {
        f"{name} {i}": [decoder] for name in DECODERS for i, decoder in enumerate(settings(name))
    }
    assert nowhere_asserted(each) == ["ni 0"]


def test_the_indicator_accepts_some_cells(indicator: str) -> None:
    """Else `ni` would be its slow end in every world, and what its indicator decides would go
    untested."""
    model = WORLDS["native"]()

    def passes(accept: float) -> int:
        decoder = make_decoder("ni", {"indicator": indicator, "accept": accept, "conf": 1.0})
        return sum(
            r.forward_passes
            for r in generate(model, PROMPTS, [params(decoder, i) for i in range(3)])
        )

    assert passes(0.0) < passes(0.5)
    assert passes(0.5) < passes(1.0)


@pytest.mark.parametrize("name", DECODERS)
def test_parameters_out_of_range_are_refused_by_name(name: str) -> None:
    # an empty default stands for a file
    kinds = {f.name: str(f.type) for f in fields(DECODERS[name]) if f.default != ""}
    bad = [
        (o, v)
        for o, kind in kinds.items()
        if "int" in kind or "float" in kind
        if "tuple" not in kind
        for v in (-1, float("nan"), "high")
    ]
    bad += [(option, "sideways") for option, kind in kinds.items() if kind == "str"]
    if not bad:
        pytest.skip(f"{name} has no option with a range")
    for option, value in bad:
        with pytest.raises(ConfigError, match=option if value != "sideways" else "sideways"):
            make_decoder(name, {option: value})


def test_unknown_names_and_options_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="threshold"):
        make_decoder("treshold")
    with pytest.raises(ConfigError, match="did you mean 'tau'"):
        make_decoder("threshold", {"tua": 0.5})
    with pytest.raises(ConfigError, match="more than the 4 cells"):
        check_fits(SamplingParams(decoder="fixed-k", options={"k": 5}), [0], toy_spec(4, 16))
    with pytest.raises(BdlmError, match="uniform"):
        check_fits(SamplingParams(), [0], TOYS["uniform"].make().spec)


def test_a_decoder_of_the_user_is_named_by_module() -> None:
    decoder = make_decoder("bdlm.generation.decoders.confidence:Threshold", {"tau": 0.5})
    assert decoder == make_decoder("threshold", {"tau": 0.5})
    for wrong in (
        "bdlm.nowhere:Threshold",
        "bdlm.generation.decoders.confidence:Nothing",
        "bdlm.generation.decoders.confidence:best",
    ):
        with pytest.raises(ConfigError, match=r"package\.module:(Class|Name)"):
            make_decoder(wrong)


# -- planted faults --------------------------------------------------------------------------------


@dataclass(frozen=True)
class FillsGiven(Decoder):
    def choose(self, view: View) -> Commit:
        return Commit(torch.ones_like(view.masked), view.drawn(view.masked))


@dataclass(frozen=True)
class NeverFills(Decoder):
    def choose(self, view: View) -> Commit:
        return Commit(torch.zeros_like(view.masked), view.ids)


@dataclass(frozen=True)
class LooksAtNeighbours(Decoder):
    def choose(self, view: View) -> Commit:
        busy = view.masked.sum() > view.masked.shape[1]
        return Commit(
            view.masked if bool(busy) else view.masked & (view.masked.long().cumsum(1) == 1),
            view.drawn(view.masked),
        )


@dataclass(frozen=True)
class FalseSlowEnd(Decoder):
    def choose(self, view: View) -> Commit:
        return Commit(view.masked, view.drawn(view.masked))

    def reference(self) -> Decoder:
        return make_decoder("first-hitting")


@dataclass(frozen=True)
class WritesMask(Decoder):
    def choose(self, view: View) -> Commit:
        return Commit(view.masked, torch.full_like(view.ids, view.ids.max().item()))


@pytest.mark.parametrize(
    "fault", [FillsGiven, NeverFills, LooksAtNeighbours, FalseSlowEnd, WritesMask]
)
def test_a_planted_fault_is_caught(fault: type[Decoder]) -> None:
    model = WORLDS["inconsistent"]()
    with pytest.raises((AssertionError, DecoderError)):
        for row in range(3):
            finishes(model, fault(), row)
        alone_and_in_company(model, [fault()] * 3)
        slow_end_is_its_reference(model, fault())
