"""The toy's pieces from the command line.

python -m toy pretrain [--out DIR]   train the base model from nothing, a few minutes on a CPU
python -m toy random --out DIR       a random checkpoint in the same layout, for any data
python -m toy teachers               print a URL and serve the teachers until standard input ends
"""

import argparse

import toy
from toy.teachers import Reasoner, serve

if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m toy", description=__doc__, formatter_class=raw)
    parser.add_argument("act", choices=["pretrain", "random", "teachers"])
    parser.add_argument("--out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", type=float, default=Reasoner.again, help="see Reasoner")
    args = parser.parse_args()
    if args.act == "teachers":
        Reasoner.again = args.again
        serve()
    elif args.act == "random":
        out = args.out or parser.error("random needs --out DIR")
        toy.random_model(out, args.seed, max_pixels=16 * 28 * 28)
    else:
        toy.pretrain(args.out or toy.BASE, seed=args.seed)
