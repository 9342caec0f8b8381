"""Mistakes on a command line: the words, and what the message must contain.

Names in braces are files that `test_mistakes.py` makes."""

from __future__ import annotations

MISTAKES = {
    "unknown command": (("evl",), "did you mean 'eval'"),
    "unknown option": (("generate", "--modle", "x"), "did you mean '--model'"),
    "missing option": (("generate",), "needs --model"),
    "value of another type": (
        ("generate", "--model", "x", "--max-new-tokens", "many"),
        "--max-new-tokens",
    ),
    "no such model": (("generate", "--model", "no-such-model"), "no-such-model"),
    "unknown decoder": (
        ("generate", "--model", "{model}", "--decoder", "first-hiting"),
        "did you mean 'first-hitting'",
    ),
    "unknown option of a decoder": (
        ("generate", "--model", "{model}", "--decoder", "ancestral", "--option", "stpes=3"),
        "did you mean 'steps'",
    ),
    "option without a value": (
        ("generate", "--model", "{model}", "--option", "steps"),
        "name=value",
    ),
    "temperature out of range": (
        ("generate", "--model", "{model}", "--temperature", "-1"),
        "temperature",
    ),
    "temperature that is not a number": (
        ("generate", "--model", "{model}", "--temperature", "inf"),
        "temperature",
    ),
    "seed of too many bits": (("generate", "--model", "{model}", "--seed", "9" * 23), "seed"),
    "option that is not YAML": (
        ("generate", "--model", "{model}", "--option", "steps=[1"),
        "--option",
    ),
    "error that is not a number": (
        ("eval", "--model", "{model}", "--data", "{text}", "--target-stderr", "nan"),
        "--target-stderr is nan",
    ),
    "seed of noise of too many bits": (
        ("eval", "--model", "{model}", "--data", "{text}", "--seed", "9" * 23),
        "64 bits",
    ),
    "window that does not move": (
        ("eval", "--model", "{model}", "--data", "{text}", "--view", "sliding", "--stride", "0"),
        "stride 0",
    ),
    "variance of no distribution": (
        ("variance", "--model", "{model}", "--data", "{text}", "--distributions"),
        "distributions is empty",
    ),
    "live and json": (("generate", "--model", "{model}", "--live", "--json"), "--json"),
    "unknown training field": (("train", "tiny", "--optim.lrr", "1"), "did you mean '--optim.lr'"),
    "short name misspelt": (("train", "tiny", "--max-minuts", "1"), "did you mean '--max-minutes'"),
    "unknown recipe": (("train", "tny"), "did you mean 'tiny'"),
    "training value out of range": (
        ("train", "tiny", "--data", "{text}", "--optim.lr", "-1"),
        "optim.lr",
    ),
    "block that does not fit": (
        ("train", "tiny", "--data", "{text}", "--block-size", "999"),
        "model.block_size",
    ),
    "unknown schedule": (
        ("train", "tiny", "--data", "{text}", "--noise.schedule", "cosin"),
        "did you mean 'cosine'",
    ),
    "unknown distribution": (
        ("train", "tiny", "--data", "{text}", "--noise.distribution", "conut"),
        "count",
    ),
    "unknown tracker": (
        ("train", "tiny", "--data", "{text}", "--log.trackers", "[tensorbord]"),
        "did you mean 'tensorboard'",
    ),
    "seed out of range": (("train", "tiny", "--data", "{text}", "--seed", "-1"), "seed is -1"),
    "a width that heads do not divide": (
        ("train", "tiny", "--data", "{text}", "--model.n_heads", "5"),
        "5 heads",
    ),
    "training on an empty file": (("train", "tiny", "--data", "{empty}"), "empty"),
    "training on bytes": (("train", "tiny", "--data", "{binary}"), "UTF-8"),
    "training on one token": (("train", "tiny", "--data", "{short}"), "two tokens"),
    "run folder that is a file": (
        ("train", "tiny", "--data", "{text}", "--out", "{empty}"),
        "empty.txt",
    ),
    "warm start from NaN": (("train", "tiny", "--data", "{text}", "--init-from", "{nan}"), "NaN"),
    "warm start of another vocabulary": (
        ("train", "tiny", "--data", "{text}", "--init-from", "{model}", "--data.tokenizer", "bpe"),
        "ids",
    ),
    "warm start of another size": (
        ("train", "tiny", "--data", "{text}", "--init-from", "{model}"),
        "model.hidden_dim",
    ),
    "no training text": (("train", "tiny"), "data.train"),
    "empty file": (("eval", "--model", "{model}", "--data", "{empty}"), "empty"),
    "not UTF-8": (("eval", "--model", "{model}", "--data", "{binary}"), "UTF-8"),
    "fewer than two tokens": (("eval", "--model", "{model}", "--data", "{short}"), "two tokens"),
    "no such data": (("eval", "--model", "{model}", "--data", "{text}.no"), "does not exist"),
    "unknown likelihood method": (
        ("eval", "--model", "{model}", "--data", "{text}", "--method", "nelboo"),
        "did you mean 'nelbo'",
    ),
    "pickle instead of a model": (("info", "--model", "{pickle}"), "pickle"),
    "pickle in a model folder": (("generate", "--model", "{pickled}"), "pickle"),
    "config that names code": (("generate", "--model", "{code}"), "trust_code"),
    "NaN weights": (("generate", "--model", "{nan}"), "has NaN or infinite values"),
    "weights that changed after saving": (
        ("generate", "--model", "{changed}"),
        "has changed since the model was saved",
    ),
    "weights cut short": (("eval", "--model", "{cut}", "--data", "{text}"), "model.safetensors"),
    "tensor that is missing": (
        ("eval", "--model", "{partial}", "--data", "{text}"),
        "norm1.weight is missing",
    ),
    "tokenizer of another model": (("eval", "--model", "{foreign}", "--data", "{text}"), "257 ids"),
    "model without a tokenizer": (("generate", "--model", "{mute}"), "holds no tokenizer"),
    "blocks of no cells": (("info", "--model", "{blockless}"), "block_size is 0"),
    "drawing of no block": (("info", "--mask", "--block-size", "0"), "--block-size"),
    "drawing of a block too large": (("info", "--mask", "--block-size", "13"), "--block-size"),
    "drawing that cannot be written": (
        ("info", "--mask", "--json", "--out", "{empty}/mask.png"),
        "empty.txt",
    ),
    "fewer than no windows": (("data", "inspect", "--data", "{text}", "--shown", "-1"), "--shown"),
    "unknown tokenizer": (
        ("data", "inspect", "--data", "{text}", "--tokenizer", "bites"),
        "tokenizer 'bites'",
    ),
    "demo of no time": (("demo", "--minutes", "nan"), "--minutes"),
    "demo of no tokens": (("demo", "--tokens", "0"), "--tokens"),
    "demo with an unknown field": (("demo", "--option", "optim.lrr=1"), "did you mean 'lr'"),
    "demo without an end": (("demo", "--minutes", "inf"), "--minutes is inf"),
    # reported before the training, not after it
    "demo with an unknown decoder": (("demo", "--decoder", "ebb"), "did you mean 'eb'"),
    "unknown benchmark": (("bench", "foo"), "bdlm bench has no 'foo'; known: generate, train"),
    "benchmark misspelt": (("bench", "trian"), "did you mean 'train'"),
    "benchmark of nothing": (("bench",), "needs a word after it: train, generate"),
    "data command misspelt": (("data", "inspct", "--data", "{text}"), "did you mean 'inspect'"),
    "length that is not a number": (
        ("data", "inspect", "--data", "{text}", "--length", "nan"),
        "--length is 'nan'; use a whole number",
    ),
    "share that is not a number": (
        ("generate", "--model", "x", "--top-p", "much"),
        "--top-p is 'much'; use a number",
    ),
    "split misspelt": (
        ("data", "inspect", "--data", "{text}", "--split", "paragraphs"),
        "did you mean 'paragraph'",
    ),
    "option of no command": (("--verson",), "did you mean '--version'"),
    "option that is the prompt": (
        ("generate", "--model", "no-such-model", "--option", "prompt=2"),
        "option 'prompt' is unknown",
    ),
    "tokens of more than 64 bits": (
        ("generate", "--model", "{model}", "--option", "top_k=9223372036854775808"),
        "top_k is 9223372036854775808; use a whole number of 64 bits",
    ),
    "block of no memory": (
        ("generate", "--model", "{model}", "--block-size", "9223372036854775807"),
        "block_size is 9223372036854775807, but the model's window",
    ),
    "steps of more than 64 bits": (
        (
            "generate",
            "--model",
            "{model}",
            "--decoder",
            "ancestral",
            "--option",
            "steps=9223372036854775808",
        ),
        "ancestral.steps is 9223372036854775808; use a whole number of 64 bits",
    ),
    "count of more than 64 bits": (
        ("generate", "--model", "{model}", "--count", "9223372036854775808"),
        "--count is 9223372036854775808; use a whole number of 64 bits",
    ),
    "batch of no memory": (
        (
            "variance",
            "--model",
            "{model}",
            "--data",
            "{text}",
            "--batch-size",
            "9223372036854775807",
        ),
        "--batch-size is 9223372036854775807; use 1 to 2^24",
    ),
    "stop string with a lone surrogate": (
        ("generate", "--model", "{model}", "--option", 'stop="\\ud800"'),
        "not UTF-8",
    ),
    "home of an unknown user": (("generate", "--model", "~nosuchuser"), "~nosuchuser"),
    "folder in the home of an unknown user": (
        (
            "frontier",
            "--model",
            "{model}",
            "--prompts",
            "{text}",
            "--texts",
            "2",
            "--seeds",
            "1",
            "--out",
            "~nosuchuser/x",
        ),
        "--out is '~nosuchuser/x'",
    ),
    "prompts in the home of an unknown user": (
        ("frontier", "--model", "{model}", "--prompts", "~nosuchuser", "--list"),
        "~nosuchuser",
    ),
    "markup for a number": (("info", "--length", "[/b]"), "--length is '[/b]'; use a whole number"),
    "name of thousands of characters": (("info", "--model", "m" * 5000), "m..."),
    "markup for a name": (("info", "--model", "[/b]"), "model '[/b]'"),
    "option of another kind": (
        ("generate", "--model", "{model}", "--option", "min_entropy=x"),
        "min_entropy is 'x'; use a number or None",
    ),
    "known tokens that are not a dictionary": (
        ("generate", "--model", "{model}", "--option", "known_tokens=[1]"),
        "known_tokens is [1]; use a dictionary",
    ),
    "empty stop string": (("generate", "--model", "{model}", "--stop", ""), "empty text"),
    "unknown device": (
        ("info", "--model", "{model}", "--device", "tpu"),
        "device is 'tpu'; use cpu, cuda or auto",
    ),
    "picture without a drawing": (("info", "--out", "mask.png"), "--mask"),
    "length of nothing": (
        ("eval", "--model", "{model}", "--data", "{text}", "--length", "0"),
        "length is 0",
    ),
    "frontier without a folder": (
        ("frontier", "--model", "{model}", "--prompts", "{text}"),
        "needs --out",
    ),
    "frontier of no temperature": (
        (
            "frontier",
            "--model",
            "{model}",
            "--prompts",
            "{text}",
            "--list",
            "--temperatures",
            "nan",
        ),
        "temperature is nan",
    ),
    "prompts that are not text": (
        ("frontier", "--model", "{model}", "--list", "--prompts", "{binary}"),
        "UTF-8",
    ),
    "one word too many": (("info", "extra"), "extra"),
    "option cut short": (("generate", "--model"), "--model"),
    "prompt that looks like an option": (
        ("generate", "--model", "x", "--prompt", "--- x"),
        "write a value that begins with a dash as --prompt='--- x'",
    ),
    "prompt that looks like options": (
        ("generate", "--model", "x", "--prompt", "-x y"),
        "--prompt needs a value; write one that begins with a dash as --prompt=",
    ),
    "stop string that looks like an option": (
        ("generate", "--model", "x", "--stop", "-a"),
        "as --name=-a",
    ),
    "option misspelt behind another": (
        ("generate", "--prompt", "--modle", "x"),
        "did you mean '--model'",
    ),
    "unknown escape": (
        ("generate", "--model", "x", "--stop", r"a\d"),
        r"--stop a\d has an unknown escape \d; use \n, \t",
    ),
    "escape cut short": (("generate", "--model", "x", "--stop", r"\x1"), r"unknown escape \x"),
    "escape of half a character": (
        ("generate", "--model", "x", "--stop", r"\ud800"),
        r"unknown escape \ud800",
    ),
    "drawing too large": (("info", "--mask", "--length", "5000"), "--length"),
    "device that does not exist": (("info", "--model", "{model}", "--device", "cuda:99"), "device"),
    "unknown dtype": (("generate", "--model", "{model}", "--dtype", "float33"), "float32"),
}
