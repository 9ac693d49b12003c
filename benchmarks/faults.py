"""What befalls a router that serves: each fault's tests, run with real processes, as a table.

    python benchmarks/faults.py

Writes `benchmarks/faults.json`: of each test its outcome, cases and seconds and, where a crowd chats while it happens, the
requests that were sent, that were acknowledged, and those of them that are in no ledger afterwards. Ends with 1 where a test did
not pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from benchmarks.run import about  # noqa: E402

RESULTS = ROOT / "benchmarks" / "faults.json"
TESTS = "finetune_assets_tests/serving"
WORST = ("skipped", "passed", "failure", "error")
FAULTS = {
    "upstream dies and comes back": ["test_upstreams.py::test_an_upstream_that_dies_and_comes_back"],
    "upstream hangs, answers 500, half a stream, or nonsense": [
        "test_router.py::test_the_champion_answers_where_the_candidate_fails",
        "test_router.py::test_a_stream_that_breaks_behind_its_role_has_not_begun",
    ],
    "router killed under load": [
        "test_journal.py::test_a_router_that_is_killed_loses_nothing_it_has_answered_and_no_arm",
        "test_journal.py::test_what_was_answered_is_logged_though_the_worker_is_killed",
    ],
    "router stopped": [
        "test_router.py::test_it_stops_in_order",
        "test_router.py::test_it_stops_after_the_longest_reply_that_the_settings_allow",
    ],
    "disk full": [
        "test_journal.py::test_a_disk_that_is_full_loses_nothing_that_was_answered",
        "test_journal.py::test_a_journal_that_cannot_be_written_costs_nothing_but_time_and_is_told",
    ],
    "ledger locked": ["test_journal.py::test_a_locked_ledger_costs_time_and_nothing_else"],
    "Postgres restarted under load": ["test_faults.py::test_postgres_is_restarted_under_load"],
    "rollback under load": ["test_faults.py::test_a_rollback_is_in_effect_in_every_worker_within_a_second_and_fails_nobody"],
    "clock jumps": ["test_faults.py::test_the_clock_is_set_forward_and_back"],
    "two people press rollback at once": ["test_faults.py::test_two_people_press_rollback_at_once"],
    "adapter file corrupt": ["test_upstreams.py::test_an_adapter_whose_file_is_corrupt_is_never_served"],
    "engine hangs": ["test_server.py::test_an_engine_that_hangs_holds_up_neither_workers_nor_the_end"],
    "a tenant's key used on another tenant": [
        "test_keys.py::test_keys_stand_between_tenants",
        "test_keys.py::test_two_tenants_begin_conversations_of_one_id_at_once",
    ],
    "10 MB body, broken JSON, control characters": [
        "test_requests.py::test_bad_bodies_are_refused_with_a_reason",
        "test_requests.py::test_control_characters_reach_neither_model_nor_store",
    ],
    "slow loris": [
        "test_requests.py::test_a_slow_loris_holds_nobody_up",
        "test_requests.py::test_a_head_that_never_ends_is_given_up",
    ],
    "more chats than can be answered": ["test_requests.py::test_more_chats_than_can_be_answered_are_told_to_come_back"],
    "schemathesis": ["test_requests.py::test_whatever_is_sent_the_api_does_what_its_openapi_says"],
}


def outcomes(report: Path) -> list[dict[str, Any]]:
    """The tests of a JUnit report under the faults they are about, in the order of FAULTS; a test's cases in one row."""
    made = {
        test: {"fault": fault, "test": test, "outcome": "skipped", "cases": 0}
        for fault, tests in FAULTS.items()
        for test in tests
    }
    for case in ET.parse(report).iter("testcase"):
        row: dict[str, Any] = made[f"{case.attrib['classname'].rpartition('.')[2]}.py::{case.attrib['name'].partition('[')[0]}"]
        ended = next((child.tag for child in case if child.tag in WORST), "passed")
        row["outcome"] = max(row["outcome"], ended, key=WORST.index)
        told = {one.attrib["name"]: int(one.attrib["value"]) for one in case.iter("property")}
        for name, value in {"cases": ended != "skipped", "seconds": float(case.attrib["time"]), **told}.items():
            row[name] = round(row.get(name, 0) + value, 1)
    return list(made.values())


def main() -> int:
    """Runs the tests and writes what they said."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = [f"{TESTS}/{test}" for tests in FAULTS.values() for test in tests]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "-o", "junit_family=xunit1"]
        command += [f"--junitxml={report}", *tests]
        ended = subprocess.run(command, cwd=ROOT, check=False).returncode
        made = outcomes(report)
    head = about("python benchmarks/faults.py", ("starlette", "uvicorn", "httptools", "sqlalchemy", "pgserver", "schemathesis"))
    RESULTS.write_text(json.dumps({**head, "rows": made}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in made:
        told = f"{row['sent']} sent, {row['acknowledged']} acknowledged, {row['lost']} lost" if "sent" in row else ""
        print(f"{row['fault']:<58}{row['outcome']:<9}{row['cases']:>3}{row.get('seconds', 0.0):>7.1f} s  {told}")
    return ended


if __name__ == "__main__":
    sys.exit(main())
