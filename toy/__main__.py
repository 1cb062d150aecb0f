import argparse
import asyncio
import base64
import io

from PIL import Image

import toy
from toy import *  # noqa
from toy import BASE, MLLM, SIDE, Reasoner

__doc__ = toy.__doc__

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("act", choices=["pretrain", "random", "show", "teachers"])
    parser.add_argument("--out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--again",
        type=float,
        default=Reasoner.again,
        help="of the reasoner: how readily it looks again",
    )
    args = parser.parse_args()
    if args.act == "pretrain":
        pretrain(args.out or BASE, seed=args.seed)
    elif args.act == "random":
        random_model(
            args.out or parser.error("random needs --out DIR"), args.seed, max_pixels=16 * 28 * 28
        )
    elif args.act == "teachers":
        Reasoner.again = args.again
        asyncio.run(teachers())
    else:
        sheet = Image.new("RGB", (8 * SIDE, SIDE))
        for i, record in enumerate(problems(8, args.seed, "show")):
            sheet.paste(Image.open(io.BytesIO(record.images[0])), (i * SIDE, 0))
            url = "data:image/png;base64," + base64.b64encode(record.images[0]).decode()
            told = MLLM().chat(
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": url}},
                            {
                                "type": "text",
                                "text": "description " + record.problem + " Reasoning :",
                            },
                        ],
                    }
                ]
            )
            chain = Reasoner().chat([{"role": "user", "content": f"{told}\n{record.problem}"}])
            print(f"{record.problem}  answer {record.answer}\n  {told}\n  {chain}\n")
        sheet.save(args.out or "toy.png")
