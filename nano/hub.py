"""What is not on this disk yet: names on the Hugging Face hub, and pictures at a URL.

  model("Qwen/Qwen2.5-VL-7B-Instruct")     -> its folder in the hub's cache; a folder stays as it is
  dataset("Osilly/Vision-R1-rl", choose)   -> the same, with the files that `choose` takes
  fetched("https://...")                   -> the file of a picture

Downloads are resumed and kept (HF_HOME says where). Whatever goes wrong is one ValueError with the
command that brings the files.
"""

import hashlib
import os
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from urllib.request import Request, urlopen

from huggingface_hub import HfApi, constants, snapshot_download
from tqdm import tqdm

from nano import archives
from nano.archives import Unreadable

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
# The beginning of a file's name -> where the pictures of that file are: repository and files.
PICTURES = {
    "vision_r1_llava_cot": ("Xkev/LLaVA-CoT-100k", ["image.zip.part-*"]),
    "vision_r1_mulberry": ("HuanjinYao/Mulberry-SFT", ["mulberry_images.tar"]),
}


def is_name(path: str | Path) -> bool:
    """OWNER/NAME, and nothing on this disk is called like this."""
    text = str(path)
    is_file = text.endswith((".parquet", ".jsonl", ".json", ".csv", ".tsv"))
    named = re.fullmatch(r"\w[\w.-]*/[\w.-]+", text) and not is_file
    return bool(named) and not os.path.exists(text)


def command(name: str, patterns=(), repo_type: str = "dataset") -> str:
    """The command line that downloads it."""
    words = ["hf", "download", name]
    words += ["--repo-type", "dataset"] if repo_type == "dataset" else []
    return shlex.join(words + [word for p in patterns for word in ("--include", p)])


def snapshot(name: str, patterns=(), repo_type: str = "dataset") -> Path:
    """The folder of a repository in the cache, after what is missing of these files was fetched."""
    what = dict(repo_type=repo_type, allow_patterns=list(patterns) or None)
    try:
        with suppress(Exception):  # It needs the network, and below the cache may be enough.
            dry = [] if constants.HF_HUB_OFFLINE else snapshot_download(name, dry_run=True, **what)
            sizes = [f.file_size or 0 for f in dry if f.will_download]
            if sizes and os.environ.get("RANK", "0") == "0":
                much = f"{len(sizes)} files, {sum(sizes) / 1e9:,.2f} GB"
                tqdm.write(f"from the hub: {name}, {much}, into {constants.HF_HUB_CACHE}")
        return Path(snapshot_download(name, **what))
    except Exception as error:  # No network, an unknown or gated name, a full disk, ...
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else str(error).split("\n")[0]
        raise ValueError(
            f"{name} is neither on this machine nor could it be fetched from the hub ({why}). "
            f"Where there is a network: {command(name, patterns, repo_type)}"
        ) from error


def maker(path: str) -> str:
    """The command whose result this folder is, by the names of the recipes in the stages."""
    made = re.fullmatch(r"(?:\./)?runs/([^/]+)/final/?", path)
    for stage in ("sft.py", "grpo.py") if made else ():
        if f'"{made[1]}":' in (Path(__file__).parents[1] / stage).read_text():
            return f"; this makes it: torchrun --nproc_per_node 8 {stage} --recipe {made[1]}"
    return " (OWNER/NAME)"


@lru_cache
def model(path: str) -> str:
    """A model's folder, or its name on the hub -> its folder."""
    if not is_name(path):
        if not Path(path).is_dir():
            raise ValueError(f"{path}: no such folder, and no name on the hub{maker(str(path))}")
        return str(path)
    return str(snapshot(path, MODEL_FILES, "model"))


def dataset(name: str, choose: Callable[[list[str]], list[str]]) -> Path:
    """A data set's folder; `choose` picks the patterns to fetch out of the names of its files."""
    try:
        names = HfApi().list_repo_files(name, repo_type="dataset")
    except Exception:  # What was fetched before will do, and `snapshot` says what is wrong.
        repo = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
        head = repo / "refs/main"
        folder = repo / "snapshots" / (head.read_text() if head.exists() else "none")
        names = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
    return snapshot(name, choose(names) if names else ())


def fetched(url: str) -> str:
    """A picture at a URL -> its file in the cache. Unreadable if it cannot be had."""
    folder = Path(constants.HF_HOME) / "nano-vision-r1"
    path = folder / hashlib.sha256(url.encode()).hexdigest()
    if path.exists():
        return str(path)
    if constants.HF_HUB_OFFLINE:
        raise Unreadable(f"{url} was not fetched before, and HF_HUB_OFFLINE is set")
    try:
        agent = {"User-Agent": "nano-vision-r1"}  # Some servers refuse Python's own.
        with urlopen(Request(url, headers=agent), timeout=30) as reply:
            content = reply.read(archives.MOST_BYTES + 1)
    except Exception as error:  # A bad address, no answer, a broken one, ...
        raise Unreadable(f"{url}: {error}") from error
    if len(content) > archives.MOST_BYTES:
        raise Unreadable(f"{url}: more than {archives.MOST_BYTES:,} bytes")
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")  # Another rank may fetch it at the same time.
    part.write_bytes(content)
    os.replace(part, path)
    return str(path)
