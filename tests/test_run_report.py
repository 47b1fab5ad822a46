import json
from html.parser import HTMLParser

import numpy as np
import pytest

from swin_dense.tools.recipe import read_recipe
from swin_dense.tools.run_folder import RunFolder
from swin_dense.tools.run_report import write_report
from swin_dense.training.events import Event, append_event
from swin_dense.training.metrics_file import MetricsFile


class Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.texts, self.sources, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.sources.append(dict(attrs)["src"])
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def shown(folder):
    write_report(folder)
    page = Text()
    page.feed(folder.report.read_text(encoding="utf-8"))
    assert not page.open and all(source.startswith("data:image/") for source in page.sources)
    return page


@pytest.mark.usefixtures("one_thread")
def test_report_shows_what_a_run_left(tiny_run):
    folder = RunFolder(tiny_run.folder)
    page, scores = shown(folder), json.loads(folder.scores.read_text())
    assert f"{folder.path.name}: after 4 steps" in page.texts
    assert any(text.startswith("Step 4 of 4") for text in page.texts)
    pictures = list(folder.pictures.rglob("*.png"))
    assert len(page.sources) == 1 + len(pictures) and len(pictures) >= 3  # the curves too
    assert {"Scores", "By class", "Confusion", "Plan and measurement", "Environment", "Recipe"} <= set(page.texts)
    assert ("Kinds of errors" in page.texts) == (tiny_run.task == "instance")
    for name in scores["table"]:
        assert name in page.texts
    for name in scores["per_class"]:
        assert name in page.texts
    assert all(sentence in page.texts for sentence in scores["explanations"])
    assert "machine" not in page.texts and "torch" in page.texts


def test_report_of_a_run_that_has_just_begun(tmp_path):
    folder = RunFolder(tmp_path / "new")
    folder.write_recipe(read_recipe("shapes_semantic"))
    page = shown(folder)
    assert "new: not yet evaluated" in page.texts and "No step has been logged yet." in page.texts
    assert not page.sources and "Recipe" in page.texts and "Scores" not in page.texts


def test_plan_stands_beside_what_was_measured(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_recipe(read_recipe("shapes_semantic"))
    metrics = MetricsFile(folder.metrics)
    for step, seconds in ((1, 9.0), (2, 0.5), (3, 0.25)):
        metrics.append(step, {"loss": 1.0, "step_time_s": seconds, "data_time_s": 0.125, "peak_memory_gb": step / 2})
    folder.plan.write_text(json.dumps({"step_time_s": 0.75, "peak_memory_gb": 2.0}))
    texts = shown(folder).texts
    start = texts.index("Plan and measurement")
    assert [text for text in texts[start : texts.index("Recipe")] if text] == [
        "Plan and measurement",
        *("planned", "measured"),
        *("seconds a step", "0.750", "0.500"),
        *("of it waiting for data, s", "n/a", "0.125"),
        *("peak memory, GB", "2.000", "1.500"),
    ]


def test_events_are_counted_and_the_last_are_shown(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_recipe(read_recipe("shapes_semantic"))
    for step in range(40):
        append_event(folder.events, Event(step, "out_of_memory" if step else "unreadable", f"step {step}: <b>told</b>"))
    with open(folder.events, "a") as file:
        file.write('{"step": 41, "ki')  # a line that is still being written
    texts = shown(folder).texts
    assert "1 unreadable, 39 out of memory; the last 30 are shown." in texts
    assert "step 39: <b>told</b>" in texts and "step 9: <b>told</b>" not in texts


def test_confusion_of_many_classes_is_left_out(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_recipe(read_recipe("shapes_semantic"))
    for num_classes, is_shown in ((24, True), (25, False)):
        per_class = {f"class {number}": {"IoU": 0.5} for number in range(num_classes)}
        confusion = np.arange(num_classes**2).reshape(num_classes, -1).tolist()
        folder.write_scores({"per_class": per_class, "confusion": confusion, "explanations": []}, {"mIoU": 0.5}, 3)
        assert ("Confusion" in shown(folder).texts) == is_shown


def test_classes_without_objects_and_detections_have_no_row(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_recipe(read_recipe("shapes_instance"))
    counts = {"cat": {"objects": 5, "missed": 5}, "dog": {"objects": 0, "missed": 0}}
    errors = {"best": {"score_threshold": None, "F1": None}, "per_class": counts, "confusion": []}
    scores = {"per_class": {"cat": {"AP": 0.0}, "dog": None}, "errors": errors, "explanations": []}
    folder.write_scores(scores, {"box AP": 0.0}, 3)
    texts = shown(folder).texts
    assert texts.count("cat") == 2 and "dog" not in texts


def test_page_that_cannot_be_written_leaves_the_former_one(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.write_recipe(read_recipe("shapes_instance"))
    write_report(folder)
    former = folder.report.read_bytes()
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_report(folder)
    assert folder.report.read_bytes() == former
    assert sorted(path.name for path in folder.path.iterdir()) == ["recipe.yaml", "report.html"]
