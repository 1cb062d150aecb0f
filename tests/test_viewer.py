"""tools/viewer.py: what goes into the page, and the page itself in a headless Chromium.

The browser is driven over its own pipe; no package is needed.
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
from conftest import ROOT
from PIL import Image

import toy
from nano.data import write_parquet
from tools import viewer

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
HOSTILE = (
    '</script><script>document.title="owned"</script><!-- <script> '
    "<img src=x onerror='document.title=\"owned\"'> "
    "<style>*{display:none}</style> &lt;b&gt; \u202eevil\u0000 \u2028 \ud800 ${1} `x` </p></main> "
    "Wait, wait! awaiting <answer> 7 </answer>"
)


def sample(step, record, k, why="ok", **more):
    right = why == "ok"
    return (
        dict(
            step=step,
            max_len=64,
            id=record.id,
            source=record.source,
            problem=record.problem,
            answer=record.answer,
            choices=None,
            completion=f"<think> Hmm , number {k} . </think> <answer> {record.answer} </answer>",
            reward=float(right),
            why=why,
            advantage=0.5 if right else -0.5,
            length=10 + k,
            finish="length" if why == "truncated" else "stop",
        )
        | more
    )


def write(folder, rows, records=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if records:
        write_parquet(folder / "problems.parquet", records)
        (folder / "config.json").write_text(json.dumps({"data": str(folder / "problems.parquet")}))
    return folder


class Embedded(HTMLParser):
    """what a browser's parser would see: elements, the policy, the text of each script"""

    def __init__(self, html):
        super().__init__()
        self.scripts, self.tags, self.policy, self.inside = [], [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")
        if tag == "meta" and dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"]

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.scripts[-1] += text


def read_page(path):
    html = Embedded(path.read_text(encoding="utf-8"))
    assert len(html.scripts) == 2
    return json.loads(html.scripts[0]), html


# ---- without a browser


def test_the_page_holds_the_rows_the_pictures_and_nothing_foreign(tmp_path, capsys):
    records = toy.problems(3, 0, "v")
    records[2].images = records[1].images  # one picture, two problems
    rows = [
        sample(s, r, k, why)
        for s, r in enumerate(records, 1)
        for k, why in enumerate(["ok", "wrong", "truncated"])
    ]
    rows[0]["completion"] = HOSTILE
    viewer.main([str(write(tmp_path / "runs" / "a", rows, records))])
    assert "9 completions in 3 groups, 2 pictures" in capsys.readouterr().out
    page, html = read_page(tmp_path / "runs" / "a" / "view.html")
    assert page["name"] == "runs/a" and page["words"] == [
        "Wait",
        "Hmm",
        "Mistake",
        "Alternatively",
        "Check",
    ]  # Table 4
    said = [s[0] for g in page["groups"] for s in g[3]]
    assert said == [
        r["completion"] for r in rows
    ]  # to the last character, half a surrogate pair included
    assert [(g[0], page["problems"][g[1]][0], g[2]) for g in page["groups"]] == [
        (1, "v-0", 64),
        (2, "v-1", 64),
        (3, "v-2", 64),
    ]
    assert [s[1:] for s in page["groups"][1][3]] == [
        [1, 1.0, "ok", 0.5, 10, 0, None],
        [0, 0.0, "wrong", -0.5, 11, 0, None],
        [0, 0.0, "truncated", -0.5, 12, 1, None],
    ]
    assert [p[5] for p in page["problems"]] == [[0], [1], [1]]
    for uri, record in zip(page["images"], records):
        ours = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGB")
        assert (
            ours.tobytes() == Image.open(io.BytesIO(record.images[0])).convert("RGB").tobytes()
        )  # small: kept as it was
        assert b"cells" not in base64.b64decode(
            uri.split(",", 1)[1]
        )  # what else the file held is not passed on
    assert (
        "default-src 'none'" in html.policy
        and "img-src data:;" in html.policy
        and "unsafe" not in html.policy
    )
    assert not re.search(r"https?:|//[a-z]", html.policy)
    for (
        tag,
        attributes,
    ) in html.tags:  # nothing is loaded from anywhere, no handler is written into the markup
        assert not {"src", "href", "style"} & attributes.keys() and not any(
            name.startswith("on") for name in attributes
        ), tag


def test_answers_of_an_evaluation_are_grouped_by_question(tmp_path):
    records = toy.problems(2, 0, "v")
    rows = [
        dict(
            id=r.id,
            sample=s,
            source=r.source,
            problem=r.problem,
            choices=["3", "4"],
            completion="x",
            answer=r.answer,
            given=None,
            right=s == 1,
            why="format",
            format_ok=False,
            length=3,
            finish="stop",
        )
        for r in records
        for s in range(2)
    ]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "config.json").write_text(json.dumps({"data": "gone.jsonl", "max_len": 256}))
    page, wrong = viewer.build(tmp_path)
    assert [(g[0], g[2], [s[1] for s in g[3]]) for g in page["groups"]] == [
        (0, 256, [0, 1]),
        (0, 256, [0, 1]),
    ]
    assert page["problems"][0][4] == ["3", "4"] and page["images"] == []
    assert (
        "gone.jsonl: no such file" in page["problems"][0][6]
        and "--data" in page["problems"][0][6]
        and len(wrong) == 2
    )
    write_parquet(tmp_path / "moved.parquet", records)
    page, wrong = viewer.build(tmp_path / "responses.jsonl", str(tmp_path / "moved.parquet"))
    assert len(page["images"]) == 2 and page["problems"][0][6] == "" and not wrong


def test_why_a_picture_is_missing(tmp_path):
    records = toy.problems(4, 0, "v")
    folder = write(tmp_path, [sample(1, r, 0) for r in records], records)
    records[0].id, records[1].problem, records[2].images = (
        "other",
        "<image>Another question .",
        [b"no picture"],
    )
    write_parquet(folder / "problems.parquet", records)
    page, _ = viewer.build(folder)
    notes = [p[6] for p in page["problems"]]
    assert (
        "is not in" in notes[0]
        and "another problem" in notes[1]
        and "identify" in notes[2]
        and notes[3] == ""
    )
    (tmp_path / "problems.jsonl").write_text(
        "".join(
            json.dumps(vars(r) | {"images": ["gone.png"]}) + "\n" for r in toy.problems(1, 0, "v")
        )
    )
    page, _ = viewer.build(folder, str(tmp_path / "problems.jsonl"))
    assert "missing image" in page["problems"][0][6] and "gone.png" in page["problems"][0][6]
    (folder / "config.json").unlink()
    assert "give --data" in viewer.build(folder)[0]["problems"][0][6]


def test_pictures_fit_their_budget(tmp_path):
    records = toy.problems(6, 0, "v")
    for i, r in enumerate(records):  # noise: nothing compresses worse
        out = io.BytesIO()
        Image.effect_noise((450, 350), 80 + i).convert("RGB").save(out, "PNG")
        r.images = [out.getvalue()]
    folder = write(tmp_path, [sample(1, r, 0) for r in records], records)
    page, wrong = viewer.build(folder, image_mb=0.1)
    sizes = [
        Image.open(io.BytesIO(base64.b64decode(u.split(",", 1)[1]))).size for u in page["images"]
    ]
    assert len(sizes) == 6 and sum(map(len, page["images"])) <= 100_000 and not wrong
    assert all(abs(w / h - 9 / 7) < 0.02 and w <= 320 for w, h in sizes)
    page, wrong = viewer.build(folder, image_mb=0.002)
    assert (
        not page["images"] and all("budget" in p[6] for p in page["problems"]) and len(wrong) == 6
    )


def test_bad_rows_are_reported_and_the_rest_is_shown(tmp_path, capsys):
    record = toy.problems(1, 0, "v")[0]
    rows = [
        sample(1, record, 0, reward=float("nan"), advantage=None, length="7"),
        {"step": 2},
        [1],
        sample(1, record, 1),
    ]
    folder = write(tmp_path, rows, [record])
    with open(folder / "samples.jsonl", "a") as f:
        f.write('{"step": 3, "id"')
    viewer.main([str(folder), "--out", str(tmp_path / "new" / "page.html")])
    shown = capsys.readouterr()
    assert (
        "samples.jsonl:2: no id" in shown.err
        and "samples.jsonl:3" in shown.err
        and "samples.jsonl:5: not JSON" in shown.err
    )
    page, _ = read_page(tmp_path / "new" / "page.html")
    assert [s[2:6] for s in page["groups"][0][3]] == [
        [None, "ok", None, None],
        [1.0, "ok", 0.5, 11],
    ]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: p / "nowhere", "no such run or file"),
        (lambda p: write(p / "below" / "run", [{}]).parent, "below.run"),
        (lambda p: write(p, []), "it is empty"),
        (lambda p: write(p, [{"step": 1}]), "no rollouts in it.*no id, problem, completion"),
    ],
)
def test_what_is_no_run_ends_with_one_line(tmp_path, make, words):
    with pytest.raises(SystemExit, match=words):
        viewer.main([str(make(tmp_path))])


def test_the_command(tmp_path):
    record = toy.problems(1, 0, "v")[0]
    folder = write(tmp_path, [sample(1, record, 0)], [record])
    command = [sys.executable, "-m", "tools.viewer", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"wrote {tmp_path / 'view.html'}: 1 completions" in done.stdout, done.stderr


def test_an_advantage_for_each_token_is_shown_by_its_mean(tmp_path):
    record = toy.problems(1, 0, "v")[0]
    given = [0.25, [0.5, 0.25, -0.125], [], ["</script>"], [float("nan"), 1.0], {"a": 1}]
    rows = [sample(1, record, k, advantage=advantage) for k, advantage in enumerate(given)]
    page, _ = viewer.build(write(tmp_path, rows, [record]))
    shown = [s[4] for s in page["groups"][0][3]]
    assert shown == [0.25, round(0.625 / 3, 4), None, None, None, None]
    assert b"NaN" not in viewer.page(page)


def test_the_head_names_the_patch_the_adapters_and_the_prefill(tmp_path):
    record, run = toy.problems(1, 0, "v")[0], tmp_path / "ablations" / "rloo" / "0"
    write(run, [sample(1, record, 0, reward=0.63)])
    assert viewer.build(run)[0]["about"] == "variant rloo"
    (run / "config.json").write_text(json.dumps(dict(lora_rank=8, prefill="<think>")))
    about = viewer.build(run)[0]["about"]
    assert about == "variant rloo · LoRA of rank 8 · answers begin with '<think>'"
    (run / "final").mkdir()  # An evaluation does not know the rank: its model's run does.
    rows = [sample(0, record, 0, reward=0.63)]
    (write(tmp_path / "eval", rows) / "config.json").write_text(
        json.dumps(dict(model=str(run / "final"), prefill=""))
    )
    page = viewer.build(tmp_path / "eval")[0]
    assert page["about"] == "LoRA of rank 8"
    assert page["groups"][0][3][0][1:3] == (1, 0.63)  # Right, with the reward that was trained on.


# ---- in a browser


class Page:
    """A page in headless Chromium. DevTools messages go over its pipe: JSON, then a zero byte."""

    def __init__(self, folder):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()

        # It reads from 3 and writes to 4.
        flags = "headless no-sandbox disable-gpu disable-quic no-first-run remote-debugging-pipe "
        flags += "disable-background-networking disable-component-update disable-sync"
        wired = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", BROWSER]
        self.process = subprocess.Popen(
            [
                *wired,
                *(f"--{flag}" for flag in flags.split()),
                f"--user-data-dir={folder}",
                "about:blank",
            ],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.reader, self.writer, self.count, self.session, self.events = (
            os.fdopen(ours_in, "rb"),
            ours_out,
            0,
            None,
            [],
        )
        self.buffer = b""
        target = next(
            t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page"
        )
        self.session = self.send(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def receive(self):
        while b"\0" not in self.buffer:
            piece = os.read(self.reader.fileno(), 1 << 16)
            assert piece, "the browser has ended"
            self.buffer += piece
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def send(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path, width=1280, height=800, dark=False):
        """-> seconds from asking for the page to its load event, when its script has drawn it."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.events, began = [], time.perf_counter()
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self.receive())
        return time.perf_counter() - began

    def js(self, code):
        out = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in out, out
        return out["result"].get("value")

    def press(self, *keys):
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                self.send(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    key=key,
                    **({"text": key} if kind == "keyDown" and len(key) == 1 else {}),
                )

    def faults(self):
        """-> (requests for anything but the page and its data, errors and refused requests)."""
        urls = [
            e["params"]["request"]["url"]
            for e in self.events
            if e["method"] == "Network.requestWillBeSent"
        ]
        errors = [
            e["params"]
            for e in self.events
            if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")
        ]
        return [u for u in urls if not u.startswith(("data:", "file:"))], errors

    def close(self):
        os.close(self.writer)  # it ends when its pipe does
        self.process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not BROWSER:
        pytest.skip("no chromium here: the page is not opened")
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Steps 1 to 6, two sources, groups of 4. In step s, s - 1 are right, then one is cut."""
    folder, records = tmp_path_factory.mktemp("runs") / "toy", toy.problems(6, 0, "v")
    rows = []
    for step, r in enumerate(records, 1):
        r.source = "odd" if step % 2 else "even"
        why = (["ok"] * (step - 1) + ["truncated"] + ["wrong"] * 3)[:4]
        rows += [sample(step, r, k, w) for k, w in enumerate(why)]
    rows[1]["completion"] = HOSTILE
    viewer.main([str(write(folder, rows, records))])
    return folder / "view.html"


PLACE = "document.getElementById('place').textContent"
CARDS = "[...document.querySelectorAll('.card .verdict')].map(x => x.textContent.slice(2))"
STEP = "document.getElementById('stepname').textContent"


def test_keys_step_through_training_and_filter(browser, trained):
    browser.open(trained)
    assert browser.js(PLACE) == "1 of 6" and browser.js(CARDS) == [
        "truncated",
        "wrong",
        "wrong",
        "wrong",
    ]
    browser.press("j", "ArrowDown", "ArrowRight")
    assert (
        browser.js(PLACE) == "4 of 6"
        and browser.js(STEP) == "step 4 of 6"
        and browser.js(CARDS) == ["right"] * 3 + ["truncated"]
    )
    browser.press("k", "ArrowLeft", "ArrowUp", "ArrowUp")  # the last one stops at the first group
    assert browser.js(PLACE) == "1 of 6"
    browser.press("r")
    assert (
        browser.js(PLACE) == "1 of 5"
        and browser.js(STEP) == "step 2 of 6"
        and browser.js(CARDS) == ["right"]
    )
    browser.press("x", "End")
    assert (
        browser.js(PLACE) == "4 of 4"
        and browser.js(STEP) == "step 4 of 6"
        and browser.js(CARDS) == ["truncated"]
    )
    browser.press("s")  # source: even -> steps 2 and 4 have a truncated one
    assert (
        browser.js(PLACE) == "2 of 2"
        and browser.js("document.getElementById('source').value") == "even"
    )
    browser.press("s", "s", "a", "o")  # odd (step 3 is the last), every source, only this step
    assert browser.js(PLACE) == "1 of 1" and browser.js("document.getElementById('only').checked")
    browser.press("ArrowRight")
    assert (
        browser.js(PLACE) == "1 of 1"
        and browser.js(STEP) == "step 4 of 6"
        and browser.js(CARDS) == ["right"] * 3 + ["truncated"]
    )
    browser.press("w")  # none is wrong in this step
    assert "Nothing" in browser.js(PLACE) and browser.js(CARDS) == []
    browser.press("a", "o", "/", *"v-3")  # the letters go to the field, they are no commands there
    time.sleep(0.3)
    assert browser.js(PLACE) == "1 of 1" and browser.js(STEP) == "step 4 of 6"
    assert browser.faults() == ([], [])


def test_hostile_text_is_text(browser, trained):
    browser.open(trained)
    assert browser.js("document.title") == "runs0/toy · rollouts"
    shown = browser.js("document.querySelectorAll('.said')[1].textContent")
    expected = (
        HOSTILE.replace("\u202e", "U+202E").replace("\x00", "U+0000").replace("\ud800", "\ufffd")
    )
    assert (
        shown.replace("\ud800", "\ufffd") == expected
    )  # nothing lost, what is invisible is spelt out
    assert browser.js("document.querySelectorAll('.said *:not(span):not(mark)').length") == 0
    second = "document.querySelectorAll('.said')[1]"
    marks = browser.js(f"[...{second}.querySelectorAll('mark')].map(x => x.textContent)")
    assert marks == ["Wait", "wait"]
    assert browser.js(f"{second}.querySelector('.final').textContent") == " 7 "
    assert browser.faults() == ([], [])
    blocked = browser.js(
        "new Promise(done => {"
        "addEventListener('securitypolicyviolation', e => done(e.effectiveDirective));"
        "const s = document.createElement('script');"
        "s.textContent = 'document.title = 1'; document.body.append(s) })"
    )
    assert blocked == "script-src-elem"  # if a script did come in, it would not run


def test_a_picture_is_drawn_and_a_lost_one_explained(browser, trained, tmp_path):
    browser.open(trained)
    image = "document.querySelector('.pictures img')"
    assert browser.js(f"{image}.decode().then(() => {image}.naturalWidth)") == 84
    record = toy.problems(1, 0, "v")[0]
    folder = write(tmp_path / "lost", [sample(1, record, 0)])
    viewer.main([str(folder)])
    browser.open(folder / "view.html")
    assert "No picture" in browser.js("document.querySelector('.missing').textContent")


def luminance(colour):
    return sum(
        w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
        for w, c in zip((0.2126, 0.7152, 0.0722), colour)
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_contrast_and_width(browser, trained, dark, width):
    """WCAG 2.1 AA: every text in sight has 4.5 to 1 on what is behind it. Nothing is too wide."""
    browser.open(trained, width=width, dark=dark)
    pairs = browser.js("""(() => {
      const canvas = document.createElement('canvas');
      const pen = canvas.getContext('2d', {willReadFrequently: true});
      const rgb = layers => {
        pen.clearRect(0, 0, 1, 1);
        for (const c of layers) { pen.fillStyle = c; pen.fillRect(0, 0, 1, 1) }
        return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
      };
      const out = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      while (walk.nextNode()) {
        const text = walk.currentNode.data.trim(), node = walk.currentNode.parentElement;
        if (!text || !node.checkVisibility() || node.closest('script, option, :disabled')) continue;
        const layers = [];
        for (let at = node; at; at = at.parentElement)
          layers.unshift(getComputedStyle(at).backgroundColor);
        out.push([text.slice(0, 30), rgb(layers), rgb([getComputedStyle(node).color])]);
      }
      return out })()""")
    assert len(pairs) > 40
    for text, *colours in pairs:
        low, high = sorted(luminance([c / 255 for c in colour]) for colour in colours)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, colours)
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js(
        "[...document.querySelectorAll('button, input, select, [role=listbox], canvas')].every("
        "x => x.ariaHidden || x.ariaLabel || x.labels?.length || x.textContent.trim())"
    )


def test_ten_thousand_samples(browser, tmp_path):
    """loaded in under 3 s, few elements in the document, and a key is answered at once"""
    records = toy.problems(8, 0, "v")
    rows = [
        sample(
            1 + i // 16,
            records[i // 16 % 8],
            i,
            "ok" if i % 3 else "wrong",
            completion="<think> " + "Wait , let me see . " * 100 + "</think>",
        )
        for i in range(10_000)
    ]
    began = time.process_time()
    viewer.main([str(write(tmp_path / "run", rows, records))])
    assert time.process_time() - began < 5
    assert (
        min(browser.open(tmp_path / "run" / "view.html") for _ in range(3)) < 3
    )  # the best of three: others may be busy here
    assert (
        browser.js(PLACE) == "1 of 625"
        and browser.js("document.querySelectorAll('*').length") < 6000
    )
    took = []
    for key, place in [("End", "625 of 625"), ("w", "625 of 625"), ("Home", "1 of 625")]:
        began = time.perf_counter()
        browser.press(key)
        assert browser.js(PLACE) == place
        took.append(time.perf_counter() - began)
    assert min(took) < 0.5
