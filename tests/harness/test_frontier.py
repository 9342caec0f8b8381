"""`bdlm frontier` from its words to its files, on a tiny model that is its own judge."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import bdlm
from bdlm.api import LM
from bdlm.cli import run
from bdlm.commands.arguments import parse
from bdlm.commands.frontier import Options, command
from bdlm.core.errors import BdlmError, ConfigError, DataError
from bdlm.generation.decoders import DECODERS
from bdlm.harness import frontier
from bdlm.harness.frontier import SweepSettings, measure_point, read_points, sweep
from bdlm.harness.judges import OwnJudge
from bdlm.harness.prompts import chosen, opening, read_prompts
from bdlm.harness.summary import page, summarise
from bdlm.harness.sweeps import REFERENCE, SWEEPS, SweepPoint, points

PROMPTS = ("the cat", "and the dog", "a bird", "the sun", "all")
SETUP = SweepSettings(PROMPTS[:4], seeds=2, max_new_tokens=12, batch=8)


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LM:
    return bdlm.load(tiny_model)


@pytest.fixture(scope="module")
def done(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of five points."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    sweep(
        lm,
        OwnJudge(lm),
        points(lm, ["fixed-k:k=1,2,4", "threshold:tau=0.1"], **SETUP.request)[0],
        SETUP,
        folder,
    )
    return folder


# -- what is swept ---------------------------------------------------------------------------------


UNSWEPT = {"ni"}  # decoders that must first be trained for a model


def test_every_decoder_has_a_sweep() -> None:
    assert set(DECODERS) - UNSWEPT == set(SWEEPS), (
        "a decoder without values to sweep: add a line to SWEEPS"
    )
    for name, values in SWEEPS.items():
        assert len(values.values) >= 5 or name == "left-to-right", name


def test_default_sweep_leaves_out_what_does_not_fit_and_says_so(lm: LM) -> None:
    found, left = points(lm)
    assert found[0] == REFERENCE
    assert len({p.key for p in found}) == len(found) >= 60
    assert {p.decoder for p in found} == set(SWEEPS)
    assert any(line.startswith("fixed-k k 6") and "4 cells of a block" in line for line in left)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("treshold", "did you mean 'threshold'"),
        ("threshold:tua=0.5", "did you mean 'tau'"),
        ("threshold:tau=2", r"\[0, 1\]"),
        ("fixed-k:k=16", "4 cells of a block"),
        ("fixed-k:k", "name:option=value"),
        ("no.module:Here:k=1", "cannot be imported"),
    ],
)
def test_what_does_not_exist_is_refused_before_any_call(
    lm: LM, word: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(lm.model), "step", None)
    with pytest.raises(ConfigError, match=message):
        points(lm, [word])


def test_words_cross_their_values(lm: LM) -> None:
    found, _ = points(
        lm, ["swd:lam=1,5:k=2:tau=null", "localleap:tau=0.4"], temperatures=(1.0, 0.5)
    )
    settings = [(p.decoder, dict(p.options), p.temperature) for p in found[1:]]
    assert settings[:2] == [
        ("swd", {"tau": None, "lam": 1, "k": 2}, 1.0),
        ("swd", {"tau": None, "lam": 5, "k": 2}, 1.0),
    ]
    assert settings[4:] == [("localleap", {"tau": 0.4}, 1.0), ("localleap", {"tau": 0.4}, 0.5)]
    assert found[1].setting == "lam 1, k 2"
    assert SweepPoint.from_json(json.loads(json.dumps(found[1].to_json()))) == found[1]


def test_adaptive_blocks_end_at_the_models_line_ends(lm: LM) -> None:
    ends = dict(points(lm, ["adablock"])[0][1].options)["delimiters"]
    assert [lm.tokenizer.decode([i]) for i in ends] == ["\n"]


# -- measuring -------------------------------------------------------------------------------------


def test_a_point_is_a_function_of_its_setting(lm: LM, done: Path) -> None:
    """Texts are of one length, and the same whatever the batch."""
    old = {m.point.key: m for m in read_points(done)}
    for batch in (8, 3):
        again = measure_point(
            lm, OwnJudge(lm), REFERENCE, SweepSettings(SETUP.prompts, 2, 12, batch=batch)
        )
        assert again.texts == old[REFERENCE.key].texts
        assert again.nats == pytest.approx(old[REFERENCE.key].nats, abs=1e-3)
    assert all(m.tokens == [12] * 8 and m.finish == {"length": 8} for m in old.values())


def test_slow_end_of_a_decoder_costs_no_quality_and_fast_end_no_calls(done: Path) -> None:
    summary = summarise(read_points(done), json.loads((done / "settings.json").read_text()))
    rows = {r.label: r for r in summary.rows}
    assert summary.reference.excess.mean == 0
    assert summary.reference.accuracy == 100
    assert (
        rows["fixed-k k 1"].tokens_per_forward
        < rows["fixed-k k 2"].tokens_per_forward
        < rows["fixed-k k 4"].tokens_per_forward
    )
    # 12 tokens in 3 blocks, and the pieces that prompts leave open
    assert rows["fixed-k k 4"].tokens_per_forward > 2.4
    for row in summary.rows:
        assert row.quality.mean == pytest.approx(row.log_perplexity.mean - row.entropy.mean)
    assert {name for name in summary.aup} == {"first-hitting", "fixed-k", "threshold"}
    assert summary.aup["fixed-k"] > summary.aup["first-hitting"]


def test_a_cut_line_is_measured_again_and_nothing_else(
    lm: LM, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill in the middle of a line: the whole lines stay, byte for byte, and only the rest
    is measured."""
    folder = tmp_path / "killed"
    folder.mkdir()
    (folder / "settings.json").write_bytes((done / "settings.json").read_bytes())
    lines = (done / "points.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "points.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][: len(lines[3]) // 2])
    measured: list[str] = []
    monkeypatch.setattr(
        frontier, "measure_point", lambda *a: measured.append(a[2].key) or measure_point(*a)
    )
    wanted = [m.point for m in read_points(done)]
    found = sweep(lm, OwnJudge(lm), wanted, SETUP, folder)
    assert measured == [p.key for p in wanted[3:]]
    assert [m.point for m in found] == wanted
    assert b"".join(lines[:3]) == b"".join(
        (folder / "points.jsonl").read_bytes().splitlines(keepends=True)[:3]
    )
    assert [m.texts for m in read_points(folder)] == [m.texts for m in read_points(done)]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"max_new_tokens": 13}, "max_new_tokens .12, now 13."),
        ({"seeds": 1}, "seeds"),
        ({"prompts": PROMPTS[1:]}, "prompts"),
        ({"block_size": 2}, "block_size"),
    ],
)
def test_other_settings_are_refused_by_name(
    lm: LM, done: Path, other: dict[str, object], name: str
) -> None:
    changed = SweepSettings(**{**vars(SETUP), **other})  # type: ignore[arg-type]
    before = (done / "points.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=f"another {name}"):
        sweep(lm, OwnJudge(lm), [REFERENCE], changed, done)
    assert (done / "points.jsonl").read_bytes() == before


def test_a_folder_of_other_files_is_left_alone(lm: LM, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files and no sweep"):
        sweep(lm, OwnJudge(lm), [REFERENCE], SETUP, tmp_path)


def test_a_damaged_line_is_named(done: Path, tmp_path: Path) -> None:
    (tmp_path / "points.jsonl").write_bytes(
        b'{"point": 3}\n' + (done / "points.jsonl").read_bytes()
    )
    with pytest.raises(DataError, match="damaged"):
        read_points(tmp_path)


# -- prompts ---------------------------------------------------------------------------------------


def test_openings_end_before_the_first_speech() -> None:
    scene = (
        "MACBETH\nACT I, SCENE I. A heath.\n\n[Thunder]\n\nFirst Witch:\nWhen shall we three meet"
        " again\n"
    )
    assert opening(scene) == "MACBETH\nACT I, SCENE I. A heath.\n\n[Thunder]\n\n"
    assert opening(scene.replace("[Thunder]\n\n", "")) == "MACBETH\nACT I, SCENE I. A heath.\n\n"


def test_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\\n"}\n\n{"text": "two"}\n')
    (tmp_path / "a.txt").write_text("one\n\ntwo words\n")
    assert read_prompts(tmp_path / "a.jsonl") == ["one\n", "two"]
    assert read_prompts(tmp_path / "a.txt") == ["one", "two words"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "one"}\n{"title": 3}\n')
    messages = {"b.jsonl": "record 2 has no string 'prompt'", "c.txt": "is not a file"}
    for name, message in messages.items():
        with pytest.raises(DataError, match=message):
            read_prompts(tmp_path / name)


def test_chosen_prompts_are_spread_over_all() -> None:
    assert chosen([str(i) for i in range(46)], 4) == ["0", "11", "23", "34"]
    with pytest.raises(ConfigError, match="47 prompts are requested, there are 46"):
        chosen(["x"] * 46, 47)


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_writes_results_and_goes_on(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "out"
    words = [
        "frontier",
        "--model",
        str(tiny_model),
        "--out",
        str(out),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--texts",
        "8",
    ]
    words += ["--seeds", "2", "--max-new-tokens", "8"]
    assert run([*words, "--decoders", "fixed-k:k=2,4"]) == 0
    assert run([*words, "--decoders", "threshold:tau=0.1", "--json"]) == 0  # adds to the folder
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == json.loads((out / "frontier.json").read_text())
    assert [p["point"]["decoder"] for p in told["points"]] == [
        "first-hitting",
        "fixed-k",
        "fixed-k",
        "threshold",
    ]
    assert told["settings"]["judge"].startswith("the model itself")
    assert set(told["aup"]) == {"first-hitting", "fixed-k", "threshold"}
    text = (out / "frontier.md").read_text()
    assert "| fixed-k | k 4 |" in text
    assert "inferred" in text
    assert "(frontier-forward-passes.png)" in text
    for name in ("forward-passes", "seconds", "entropy"):
        assert (out / f"frontier-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (
        run([*words[:-2], "--max-new-tokens", "6", "--front-only", "--judge", str(tiny_model)]) == 0
    )
    again = json.loads(next(out.glob("front-*/frontier.json")).read_text())
    assert {p["point"]["decoder"] for p in again["points"]} <= {
        "first-hitting",
        "fixed-k",
        "threshold",
    }
    assert again["settings"]["max_new_tokens"] == 6
    assert run([*words, "--texts", "9"]) == 2
    assert "multiple of --seeds" in capsys.readouterr().err


def test_page_says_what_made_it() -> None:
    """Read back, the command line gives the same options."""
    asked = Options(
        "a model",
        "out",
        decoders=("fixed-k:k=2,4", "eb"),
        temperatures=(0.8, 1.0),
        front_only=True,
        seed=5,
    )
    words = shlex.split(command(asked))
    assert words[:6] == ["bdlm", "frontier", "--model", "a model", "--out", "out"]
    assert parse(Options, words[2:], "bdlm frontier") == asked


def test_front_without_a_sweep(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = [
        "--model",
        str(tiny_model),
        "--out",
        str(tmp_path / "none"),
        "--prompts",
        str(tmp_path / "prompts.txt"),
    ]
    assert run(["frontier", *words, "--texts", "4", "--seeds", "1", "--front-only"]) == 2
    assert "holds no sweep" in capsys.readouterr().err


def test_page_without_a_reference_is_refused(done: Path) -> None:
    settings = json.loads((done / "settings.json").read_text())
    kept = [m for m in read_points(done) if m.point.key != REFERENCE.key]
    with pytest.raises(BdlmError, match="first-hitting at temperature 1"):
        summarise(kept, settings)
    assert (
        page(summarise(read_points(done), settings, ["fixed-k k 6: too large"]))
        .rstrip()
        .endswith("- fixed-k k 6: too large")
    )
