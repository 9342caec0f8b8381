"""`bdlm generate`: continue a prompt; `--live` shows the blocks as they fill."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from bdlm.commands.terminal import read_input
from bdlm.core.errors import ConfigError
from bdlm.core.validation import Between, Count


@dataclass(frozen=True)
class Options:
    """Generate text with a model, block by block."""

    model: str
    """Name or folder of a model."""
    prompt: str = ""
    """Text to continue; - reads it from standard input."""
    max_new_tokens: int = 256
    """Most new tokens."""
    decoder: str = "first-hitting"
    """Decoder: a name, or package.module:Class."""
    option: tuple[str, ...] = ()
    """Parameters of the decoder or the request, as name=value: steps=16, min_entropy=2.0."""
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Nucleus: keep the most probable tokens up to this mass."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the greatest probability; 0 keeps all."""
    seed: int = 0
    """The text is a function of model, prompt, options and seed."""
    count: Count = 1
    """How many texts; text i takes seed + i."""
    stop: tuple[str, ...] = ()
    """End before any of these strings. They may hold \\n (new line), \\t (tab), \\r, \\xNN and
    \\uNNNN (characters by number) and \\\\ (one backslash)."""
    block_size: int | None = None
    """Tokens of a block; default the model's."""
    context_window: (
        Annotated[int, Between(0, 2**24, said="use 1 to 2^24, or 0 for no limit")] | None
    ) = None
    """Most tokens to look back on; default the training length, 0 for no limit."""
    cache: Literal["none", "prefix", "dual", "dllm", "dare-kv", "dare-o"] | None = None
    """Approximate cache of a full-sequence model (MDLM, SEDD)."""
    cache_option: tuple[str, ...] = ()
    """Parameters of the cache, as name=value: refresh=4."""
    live: bool = False
    """Show the blocks as they fill."""
    device: str = "cpu"
    """cpu, cuda, auto."""
    dtype: str | None = None
    """float32, bfloat16, ...; default that of the stored weights."""
    compile: bool = False
    """Compile the layers (torch.compile), for GPUs: on CPU it is slower."""
    json: bool = False
    """Print JSON: one object, or a list with --count."""


def run(options: Options) -> None:
    """Print the text, or the facts about it as JSON."""
    if options.live and (options.json or options.count > 1):
        raise ConfigError("--live shows one text as it is written; leave out --json and --count")
    if options.live and options.cache is not None:
        raise ConfigError("--live does not work with --cache; leave one of them out")
    prompt = read_input("--prompt -") if options.prompt == "-" else options.prompt
    request = _request(options)
    from bdlm.api import load
    from bdlm.generation.sampling_params import sampling_params

    cache = _cache(options)
    # refused before the model is loaded
    sampling_params(**{name: value for name, value in request.items() if name != "context_window"})
    lm = load(options.model, device=options.device, dtype=options.dtype, compile=options.compile)
    if options.live:
        from bdlm.commands.live import show

        result = show(lm, prompt, **request)
        print(f"\n{_sentence(result)}", *result.notes, sep="\n", file=sys.stderr)
        return
    results = lm.generate([prompt] * options.count, **request, **cache)
    if options.json:
        print(
            json.dumps(_facts(results[0]) if options.count == 1 else [_facts(r) for r in results])
        )
        return
    for i, result in enumerate(results):
        print(("" if i == 0 else "\n" + "-" * 40 + "\n") + prompt + result.text)
    print(_sentence(results[-1]), file=sys.stderr)
    for note in dict.fromkeys(n for r in results for n in r.notes):
        print(note, file=sys.stderr)


def _request(options: Options) -> dict[str, Any]:
    names = (
        "max_new_tokens",
        "decoder",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "block_size",
        "context_window",
    )
    own = {name: getattr(options, name) for name in names} | {
        "stop": tuple(map(unescaped, options.stop))
    }
    return own | read_options(options.option)


def _cache(options: Options) -> dict[str, Any]:
    """The approximate cache of the request, if there is one. Raises ConfigError for an option that
    it does not have."""
    if options.cache is None:
        if options.cache_option:
            raise ConfigError("--cache-option came without --cache; name the cache")
        return {}
    from bdlm.generation.full_sequence.approximate_cache import make_cache

    parameters = read_options(options.cache_option, "--cache-option", "refresh=4")
    make_cache(options.cache, parameters)
    return {"cache": options.cache, "cache_options": parameters}


ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescaped(word: str) -> str:
    """A stop string with its escapes resolved: a shell passes `\\n` on as two characters. Raises
    ConfigError for an unknown escape."""

    def character(found: re.Match[str]) -> str:
        plain, number = found["plain"], found["byte"] or found["unit"]
        if plain in ESCAPES:
            return ESCAPES[plain]
        if number and not 0xD800 <= int(number, 16) < 0xE000:  # those are halves of characters
            return chr(int(number, 16))
        raise ConfigError(
            rf"--stop {word} has an unknown escape {found[0]}; use \n, \t, \r, \xNN, \uNNNN, or \\"
            r" for a backslash"
        )

    return re.sub(
        r"\\(?:x(?P<byte>[0-9a-fA-F]{2})|u(?P<unit>[0-9a-fA-F]{4})|(?P<plain>.?))",
        character,
        word,
        flags=re.DOTALL,
    )


def read_options(
    words: tuple[str, ...], flag: str = "--option", example: str = "steps=16"
) -> dict[str, Any]:
    """Read `name=value` words as keyword options; values are YAML. flag, example: for messages."""
    import yaml

    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"{flag} {word} has no '='; write name=value, for example {example}")
        try:
            found[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(
                f"{flag} {word} is not readable; write name=value with a YAML value, for example"
                f" {example}"
            ) from None
    return found


def _facts(result: Any) -> dict[str, Any]:
    names = (
        "text tokens forward_passes tokens_per_forward seconds finish_reason token_ids log_probs"
        " notes context_window engine_steps retries num_draft_canvases"
    )
    return {name: getattr(result, name) for name in names.split()}


def _sentence(result: Any) -> str:
    return (
        f"{result.tokens} tokens in {result.seconds:.2f} s"
        f" ({result.tokens / max(result.seconds, 1e-9):,.0f} a second), {result.forward_passes}"
        f" forward passes ({result.tokens_per_forward:.2f} tokens per forward), ended by"
        f" {result.finish_reason.replace('_', ' ')}"
    )
