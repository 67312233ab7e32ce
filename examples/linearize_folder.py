"""Linearize a model that lies in a local folder, keep every fourth layer, and write it to another folder.

python examples/linearize_folder.py MODEL OUT
"""

import argparse
from pathlib import Path

from liger_models import generate, linearize, load, save


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(arguments)
    model, tokenizer = load(args.model)
    linearize(model, tokenizer=tokenizer, pattern="LLLF")
    save(model, tokenizer, args.out)
    again, tokenizer = load(args.out)
    print(again.config.liger["pattern"])
    print(generate(again, tokenizer, "Once upon a time", max_new_tokens=20))


if __name__ == "__main__":
    main()
