"""From the arguments of `LM.generate`, `LM.stream` and `LM.infill` to the `SamplingParams` of each
prompt.

The methods list every option in their signatures, so that help, editors and type checkers show
them; here they become records. Knows nothing about models."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ParamSpec, TypeVar

from bdlm.core.errors import ConfigError, shown
from bdlm.generation.sampling_params import SamplingParams, sampling_params

P = ParamSpec("P")
T = TypeVar("T")

# a decoder's parameters come as keywords of their own
SAMPLING_OPTIONS = tuple(f.name for f in fields(SamplingParams) if f.name != "options")


def params_or_options(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator of a method with an argument `sampling_params`: refuse it together with options
    that it holds, and anything else in its place. The signature stays visible."""
    names = list(inspect.signature(function).parameters)
    place = names.index("sampling_params")
    outside = {"cache", "cache_options", "context_window", "streamer", "drafts", "new_tokens"}
    outside |= {"sampling_params", *names[: place + 1]}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        params = args[place] if len(args) > place else kwargs.get("sampling_params")
        if isinstance(params, int | float):
            raise ConfigError(
                f"sampling_params is {shown(params)}; use SamplingParams(...), or name the option:"
                f" max_new_tokens={shown(params)}"
            )
        given = sorted(kwargs.keys() - outside) if params is not None else []
        if given:
            raise ConfigError(
                f"{given[0]} came together with sampling_params; leave it out, or use"
                f" sampling_params.with_({given[0]}=...)"
            )
        return function(*args, **kwargs)

    return call


def params_of_call(
    count: int,
    params: SamplingParams | Sequence[SamplingParams] | None,
    arguments: Mapping[str, Any],
    **own: Any,
) -> list[SamplingParams]:
    """The params of each of `count` prompts: those given (one for all, row i then takes seed + i,
    or one each), else made of a method's arguments.

    arguments: by name, with the decoder's parameters as "decoder_options". own: fields that the
    method sets itself. Raises ConfigError for unknown options and values out of range."""
    if params is None:
        options = {name: arguments[name] for name in SAMPLING_OPTIONS if name in arguments}
        options = {name: value for name, value in options.items() if value is not None}
        beside = arguments.keys() - {"self", "decoder_options", "sampling_params"}
        options |= arguments["decoder_options"]
        params = sampling_params(beside, **{**options, **own})
    elif own:
        several = [params] if isinstance(params, SamplingParams) else params
        params = [each.with_(**own) for each in several]
    if isinstance(params, SamplingParams):
        return [params.with_(seed=params.seed + i) for i in range(count)]
    if len(params) != count:
        raise ConfigError(f"{count} prompts came with {len(params)} params; give one each")
    return list(params)
