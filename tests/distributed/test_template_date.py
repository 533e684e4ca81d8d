"""A run whose chat template prints the date goes on with the day of its first start, wherever its cache is."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from tests.distributed.runs import Lab, different, log_text, state

DATED = (
    "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_FIRST_DAY = "2025-01-31"


def test_a_resume_trains_on_the_first_day_when_the_cache_is_lost_on_another_day(lab: Lab, tmp_path: Path) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)
    more = (f"data.chat_template={template}", "data.max_length=96", "checkpoint.save_steps=2")
    first = f"data.chat_template_date={_FIRST_DAY}"
    expected = lab.run(tmp_path / "expected", "ddp", 2, *more, first, "train.max_steps=6").checkpoint_dir(6)
    lost = f"data.cache_dir={tmp_path / 'other'}"
    stopped = lab.run(tmp_path / "stopped", "ddp", 2, *more, first, "train.max_steps=6")
    for step in (4, 6):
        for path in sorted(stopped.checkpoint_dir(step).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        stopped.checkpoint_dir(step).rmdir()
    run = lab.run(tmp_path / "stopped", "ddp", 2, *more, lost, "train.max_steps=6")  # today: no date is named
    text = log_text(run.root)
    assert "continuing from" in text and f"the chat template prints the date: {_FIRST_DAY} in this run" in text
    assert different(run.checkpoint_dir(6), expected) == []
    assert state(run.checkpoint_dir(6))["settings"]["data.chat_template_date"] == _FIRST_DAY

    other = ("data.chat_template_date=2025-02-01", "train.max_steps=8", lost)
    assert set(lab.run_codes(run.root, "ddp", 2, *more, *other)) <= {2, -9}
    assert "data.chat_template_date: '2025-01-31' in the checkpoint, '2025-02-01' now" in log_text(run.root)


def test_the_first_day_is_kept_when_nothing_was_saved_yet(lab: Lab, tmp_path: Path) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)
    more = (f"data.chat_template={template}", "data.max_length=96", "train.max_steps=1", "checkpoint=off")
    before = date.today()  # midnight may come
    run = lab.run(tmp_path / "run", "single", 1, *more)
    text = run.config.read_text()
    (today,) = [day for day in {before, date.today()} if f"chat_template_date: '{day.isoformat()}'" in text]
    run.config.write_text(text.replace(today.isoformat(), _FIRST_DAY))
    lab.run(run.root, "single", 1, *more)
    assert f"the chat template prints the date: {_FIRST_DAY} in this run" in log_text(run.root)
