import json
from datetime import datetime, timedelta

from swin_dense.training.events import Event, append_event


def test_events_are_appended_one_to_a_line(tmp_path):
    path = tmp_path / "events.jsonl"
    events = [Event(3, "skipped", "step 3:\ntwo lines, ü"), Event(7, "not_saved", "full")]
    for event in events:
        append_event(path, event)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [list(line) for line in lines] == [["step", "time", "kind", "text"]] * 2
    assert [Event(line["step"], line["kind"], line["text"]) for line in lines] == events
    assert datetime.fromisoformat(lines[0]["time"]).utcoffset() == timedelta(0)


def test_line_torn_by_a_crash_spoils_no_other(tmp_path):
    path = tmp_path / "events.jsonl"
    append_event(path, Event(1, "skipped", "one"))
    whole = path.read_text()
    path.write_text(whole + whole[:9])
    append_event(path, Event(2, "skipped", "two"))
    first, torn, last = path.read_text().splitlines()
    assert (json.loads(first)["step"], torn, json.loads(last)["step"]) == (1, whole[:9], 2)
