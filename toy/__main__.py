"""The toy's pieces from the command line.

python -m toy pretrain [--out DIR]   train the base model from nothing, a few minutes on a CPU
python -m toy random --out DIR       a random checkpoint in the same layout, for any data
python -m toy show [--out FILE]      print problems with chains, and draw a sheet of pictures
python -m toy teachers               print a URL and serve the teachers until standard input ends
"""

import argparse
import base64
import io

from PIL import Image

import toy
from toy.teachers import MLLM, Reasoner, serve
from toy.world import SIDE, problems


def show(seed: int, out: str):
    sheet = Image.new("RGB", (8 * SIDE, SIDE))
    for i, record in enumerate(problems(8, seed, "show")):
        png, text = record.images[0], record.problem
        sheet.paste(Image.open(io.BytesIO(png)), (i * SIDE, 0))
        url = "data:image/png;base64," + base64.b64encode(png).decode()
        picture = {"type": "image_url", "image_url": {"url": url}}
        ask = {"type": "text", "text": f"description {text} Reasoning :"}
        told = MLLM().chat([{"role": "user", "content": [picture, ask]}])
        chain = Reasoner().chat([{"role": "user", "content": f"{told}\n{text}"}])
        print(f"{text}  answer {record.answer}\n  {told}\n  {chain}\n")
    sheet.save(out)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m toy", description=__doc__, formatter_class=raw)
    parser.add_argument("act", choices=["pretrain", "random", "show", "teachers"])
    parser.add_argument("--out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", type=float, default=Reasoner.again, help="see Reasoner")
    args = parser.parse_args()
    if args.act == "pretrain":
        toy.pretrain(args.out or toy.BASE, seed=args.seed)
    elif args.act == "random":
        out = args.out or parser.error("random needs --out DIR")
        toy.random_model(out, args.seed, max_pixels=16 * 28 * 28)
    elif args.act == "show":
        show(args.seed, args.out or "toy.png")
    else:
        Reasoner.again = args.again
        serve()
