"""Train a byte model of 150,000 weights on a text of your own, in under a minute on a laptop.

python examples/train_tiny.py TEXT_FILE [FOLDER]
"""

import sys

import bdlm


def main(text: str, folder: str = "runs/tiny-example", steps: int = 200) -> str:
    # a recipe, and what differs from it; `bdlm train --help` lists every field
    overrides = [f"data.train={text}", f"out={folder}", f"limits.steps={steps}"]
    result = bdlm.train(bdlm.load_config("tiny", overrides))  # continues a run that was interrupted
    for bound in result.valid:
        nats, error = bound["nats_per_token"], bound["stderr"]
        print(f"blocks of {bound['block_size']}: {nats:.3f} ± {error:.3f} nats per token")
    assert result.model is not None, "stopped before its end"
    print(bdlm.load(result.model).generate("The ", max_new_tokens=100).text)
    return result.model


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:3])
