"""`deploy/` is true: its image has all it copies, its services start, its alerts and dashboard ask for what is exported."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import sqlalchemy as sa
import yaml

from finetune_assets.assistants import assistant_names
from finetune_assets.environment import ROOT
from finetune_assets.registry import Rollout
from finetune_assets.serving import keys
from finetune_assets.serving.directory import METRICS
from finetune_assets.serving.metrics import Metrics
from finetune_assets_tests.serving.servers import Hook, Upstream
from finetune_assets_tests.serving.shop import Shop, wait_for

DEPLOY = ROOT / "deploy"
SECRETS = {"POSTGRES_PASSWORD": "p", "FINETUNE_USER_KEY": "k", "GRAFANA_PASSWORD": "g"}


def compose() -> dict[str, Any]:
    """The file with its variables filled in, as `docker compose config` does."""

    def filled(found: re.Match[str]) -> str:
        default = re.fullmatch(r":-(.*)", found[2] or "")
        return SECRETS.get(found[1], default[1] if default else "")

    text, before = (DEPLOY / "compose.yaml").read_text(encoding="utf-8"), ""
    while text != before:  # a default may hold another variable
        before, text = text, re.sub(r"\$\{(\w+)((?::[-?])[^${}]*)?\}", filled, text)
    return yaml.safe_load(text)


def copied() -> list[tuple[str, str]]:
    """Source and target of the image's files."""
    lines = re.findall(r"^COPY (.+)$", (DEPLOY / "Containerfile").read_text(encoding="utf-8"), re.MULTILINE)
    return [(source, target) for *sources, target in map(str.split, lines) for source in sources]


def test_every_file_that_the_image_copies_is_tracked() -> None:
    for source, _ in copied():
        listed = subprocess.run(["git", "ls-files", "--", source], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert listed, source


def test_the_services_are_one_installation() -> None:
    services = compose()["services"]
    assert set(services) == {"postgres", "code", "daemon", "webserver", "router", "prometheus", "alertmanager", "grafana"}
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith(".") and source != "./secrets":  # the metrics' key is not in the repository
                assert (DEPLOY / source).exists(), source
            elif not source.startswith("."):
                assert source in compose()["volumes"], source
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "nothing is open to others: a proxy with TLS and login stands before it"
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    asked = re.findall(r"\$\{(\w+):\?", (DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert all(f'echo "{name}=' in readme for name in {*asked, "GRAFANA_PASSWORD"})
    assert services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "g"  # the image's own is `admin`
    provisioned = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "dashboards" / "files.yaml").read_text())
    targets = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert {provisioned["providers"][0]["options"]["path"], "/var/lib/grafana"} <= set(targets)
    assert all(f"finetune_{name}`" in readme for name in compose()["volumes"])
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"][0]["authorization"]["credentials_file"]
    assert scraped.rpartition("/")[2] == re.search(r"add --metrics .* > deploy/secrets/(\w+)", readme)[1]  # type: ignore[index]
    code = services["code"]["command"]
    workspace = yaml.safe_load((DEPLOY / "dagster" / "workspace.yaml").read_text())["load_from"][0]["grpc_server"]
    assert code[code.index("-p") + 1] == str(workspace["port"])
    assert services["code"]["environment"][workspace["host"]["env"]] == "code"
    for name in ("daemon", "webserver"):
        place = services[name]["command"][services[name]["command"].index("-w") + 1]
        assert (ROOT / Path(place).relative_to("/app")).exists()


def test_the_program_gets_its_variables_and_its_assistants() -> None:
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    program = {name: one for name, one in compose()["services"].items() if one["image"] == "finetune-assets"}
    assert set(program) == {"code", "daemon", "webserver", "router"}
    for name, service in program.items():
        assert service["env_file"] == [{"path": "app.env", "required": False}], name
        mounts = [volume.split(":") for volume in service["volumes"]]
        source = next(one[0] for one in mounts if one[1:] == [service["environment"]["FINETUNE_ASSISTANTS"], "ro"])
        assert assistant_names(DEPLOY / source), name
    kept_out = subprocess.run(["git", "check-ignore", "deploy/app.env"], cwd=ROOT, check=False, capture_output=True)
    assert kept_out.returncode == 0  # it holds keys
    assert "deploy/app.env" in readme
    assert "FINETUNE_CRON_SECRET`, `" in readme
    assert 'echo "ASSISTANTS=' in readme


def test_compose_is_what_the_specification_says() -> None:
    command = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(DEPLOY / "compose.yaml")]
    command[0] = str(Path(sys.executable).parent / command[0])
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_the_image_runs_is_in_it(image: Path) -> None:
    """What the package's metadata name, torch's pin, the programs and files of the services and the instance they use."""
    project = tomllib.loads((image / "pyproject.toml").read_text())
    assert (image / project["project"]["readme"]).is_file()
    assert all((image / name).is_file() for name in project["project"]["license-files"])
    steps = (DEPLOY / "Containerfile").read_text()
    extras = set(re.search(r"'\.\[(.+)\]'", steps)[1].split(","))  # type: ignore[index]
    assert extras <= set(project["project"]["optional-dependencies"])
    pin = re.search(r"\$\((sed .+)\)\"", steps)[1]  # type: ignore[index]
    version = subprocess.run(["bash", "-c", pin], cwd=image, capture_output=True, text=True, check=True).stdout.strip()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert version in (image / "constraints.txt").read_text()
    scripts = {*project["project"]["scripts"], "dagster", "dagster-daemon", "dagster-webserver", "python"}
    commands = [json.loads(re.search(r"^CMD (.+)$", steps, re.MULTILINE)[1])]  # type: ignore[index]
    services = [service for service in compose()["services"].values() if service["image"] == "finetune-assets"]
    commands += [service["command"] for service in services]
    commands += [service["healthcheck"]["test"][1:] for service in services if "healthcheck" in service]
    for command in commands:
        assert command[0] in scripts, command
        assert all((image / word.removeprefix("/app/")).exists() for word in command if word.startswith("/app/")), command
    for service in services:
        home = service["environment"]["DAGSTER_HOME"].removeprefix("/app/")
        assert (image / home / "dagster.yaml").is_file()
        assert "/app/data/store" in str(service["volumes"])  # what the image's user may write


def test_both_instances_of_dagster_differ_in_nothing_but_the_storage() -> None:
    local, installed = (yaml.safe_load(path.read_text()) for path in (ROOT / "dagster.yaml", DEPLOY / "dagster" / "dagster.yaml"))
    assert installed.pop("storage") == {"postgres": {"postgres_url": {"env": "DAGSTER_DATABASE_URL"}}}
    local.pop("storage")
    assert local == installed


def questions() -> list[str]:
    """PromQL of the alert rules and of the dashboard."""
    rules = yaml.safe_load((DEPLOY / "alerts.yaml").read_text(encoding="utf-8"))
    asked = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "serving.json").read_text(encoding="utf-8"))
    return asked + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def exported() -> dict[str, set[str]]:
    """Names of /metrics with their labels: those of the counters, and those of the gauges, read from the text."""
    metrics = Metrics()
    found: dict[str, set[str]] = {"up": {"job", "instance"}}  # Prometheus' own
    for collector in {*metrics.registry._collector_to_names}:
        names, labels = metrics.registry._collector_to_names[collector], set(collector._labelnames)  # type: ignore[attr-defined]
        found |= {name: labels | {"le"} if name.endswith("_bucket") else labels for name in names}
    text = metrics.text([Rollout("dental", None, 1, None)], 0.0, 0).decode()
    for name, labels in re.findall(r"^(finetune_(?:rollout|ledger|journal)\w*)(?:\{(.*)\})? ", text, re.MULTILINE):
        found[name] = set(re.findall(r"(\w+)=", labels))
    return found


@pytest.mark.parametrize("question", questions())
def test_alerts_and_dashboard_ask_for_what_the_router_exports(question: str) -> None:
    plain = str(promql_parser.parse(question))  # raises for what Prometheus would refuse
    known = exported()
    names = set(re.findall(r"\b((?:finetune_\w+)|up)\b", plain))
    assert names <= set(known)
    labels = {label for name in names for label in known[name]}
    used = {label.strip() for group in re.findall(r"by \(([^)]*)\)", plain) for label in group.split(",")}
    used |= set(re.findall(r"[{,]\s*(\w+)\s*(?:=|!=|=~|!~)\s*\"", plain))
    assert used <= labels
    assert names


def tool(name: str, *arguments: str) -> str:
    """Output of Prometheus' or Alertmanager's own tool; the test is skipped where there is none."""
    if shutil.which(name) is None:
        pytest.skip(f"no {name}: Debian's `prometheus` and `prometheus-alertmanager` have it")
    done = subprocess.run([name, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_and_alertmanager_take_their_files(tmp_path: Path) -> None:
    configuration = (DEPLOY / "prometheus.yaml").read_text().replace("/etc/prometheus/alerts.yaml", str(DEPLOY / "alerts.yaml"))
    (tmp_path / "prometheus.yaml").write_text(configuration.replace("/etc/prometheus/secrets", str(tmp_path)))
    (tmp_path / "metrics_key").write_text("a key")
    assert "5 rules found" in tool("promtool", "check", "config", str(tmp_path / "prometheus.yaml"))
    tool("amtool", "check-config", str(DEPLOY / "alertmanager.yaml"))


CHATS = 'finetune_requests_total{assistant="dental",arm="champion",kind="live",outcome="'
SERIES = {  # alert: series and their values minute by minute; those that must stay quiet
    "ChampionFails": (
        {f'{CHATS}ok"}}': "0+90x40", f'{CHATS}error"}}': "0+10x40"},
        {f'{CHATS}ok"}}': "0+99x40", f'{CHATS}error"}}': "0+1x40"},
    ),
    "RolloutWaitsForAPerson": (
        {'finetune_rollout_waits{assistant="dental"}': "1x90"},
        {'finetune_rollout_waits{assistant="dental"}': "1x50 0x40"},
    ),
    "RowsLost": ({"finetune_lost_rows_total": "0x30 1+1x30"}, {"finetune_lost_rows_total": "7x60"}),
    "LedgerOutOfReach": (
        {"finetune_ledger_age_seconds": "31x10"},
        {"finetune_ledger_age_seconds": "29x10", "finetune_journal_backlog": "200x10"},
    ),
    "RouterDown": ({'up{job="router"}': "0x5"}, {'up{job="router"}': "1x5"}),
}


@pytest.mark.parametrize("alert", SERIES)
def test_an_alert_is_raised_when_it_should_and_only_then(alert: str, tmp_path: Path) -> None:
    tests: list[dict[str, Any]] = []
    for fires, series in zip((True, False), SERIES[alert], strict=True):
        last = max(sum(int(part) for part in re.findall(r"x(\d+)", values)) for values in series.values())
        raised = {"eval_time": f"{last}m", "alertname": alert}
        wanted = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)'
        tests.append(
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {"expr": wanted, "eval_time": raised["eval_time"], "exp_samples": [{"labels": "{}", "value": int(fires)}]}
                ],
            }
        )
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(DEPLOY / "alerts.yaml")], "evaluation_interval": "1m", "tests": tests}))
    tool("promtool", "test", "rules", str(file))


@pytest.mark.slow
def test_a_router_that_goes_down_reaches_a_person(tmp_path: Path) -> None:
    """Prometheus with its key, Alertmanager and a webhook, by the files of `deploy`: only addresses, places and
    waiting times are the test's."""
    if not (shutil.which("prometheus") and shutil.which("prometheus-alertmanager")):
        pytest.skip("Debian's `prometheus` and `prometheus-alertmanager` are not installed")
    upstream, hook = Upstream(), Hook()
    shop = Shop(tmp_path, upstream=upstream.url)
    with shop.ledger() as book:
        (tmp_path / "metrics_key").write_text(keys.add(book, METRICS, "prometheus") + "\n")
    (tmp_path / "webhook").write_text(hook.url)
    prometheus, alertmanager = free_port(), free_port()

    def ask(what: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{prometheus}/api/v1/{what}", timeout=5) as answer:
            return json.load(answer)["data"]

    def state() -> str:
        with contextlib.suppress(OSError):
            return str([(one["health"], one["lastError"]) for one in ask("targets")["activeTargets"]])
        return ""

    def put(name: str, changes: dict[str, str]) -> Path:
        text = (DEPLOY / name).read_text()
        for before, after in changes.items():
            assert before in text
            text = text.replace(before, after)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    try:
        with shop.served("--no-judge") as served:
            put("alerts.yaml", {"for: 1m": "for: 1s"})
            places = {"/etc/prometheus/alerts.yaml": f"{tmp_path}/alerts.yaml", "/etc/prometheus/secrets": str(tmp_path)}
            places |= {"alertmanager:9093": f"127.0.0.1:{alertmanager}", "router:8000": served.url.removeprefix("http://")}
            scraped = put("prometheus.yaml", {**places, "scrape_interval: 15s": "scrape_interval: 1s, evaluation_interval: 1s"})
            told = put("alertmanager.yaml", {"/etc/alertmanager/secrets": str(tmp_path), "group_wait: 30s": "group_wait: 0s"})
            listen = f"--web.listen-address=127.0.0.1:{prometheus}"
            commands = [["prometheus", f"--config.file={scraped}", listen, f"--storage.tsdb.path={tmp_path}/tsdb"]]
            other = [
                f"--web.listen-address=127.0.0.1:{alertmanager}",
                f"--storage.path={tmp_path}/am",
                "--cluster.listen-address=",
            ]
            commands += [["prometheus-alertmanager", f"--config.file={told}", *other]]
            with running(commands, tmp_path, dict(os.environ)):
                assert wait_for(lambda: "'up', ''" in state(), 60), (tmp_path / "services.log").read_text()[-2000:]
                share = ask("query?query=finetune_ledger_age_seconds")["result"]
                assert float(share[0]["value"][1]) < 30
                served.process.send_signal(signal.SIGTERM)
                served.process.wait(30)
                assert wait_for(lambda: hook.got, 60), (tmp_path / "services.log").read_text()[-2000:]
        [message] = hook.got[0]["attachments"]
        assert message["title"] == "FIRING RouterDown"
        assert message["text"].strip() == "The router does not answer"
    finally:
        hook.close()
        upstream.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The files of the image, at the places that the Containerfile gives them."""
    root = tmp_path / "app"
    root.mkdir()
    for source, target in copied():
        place = root / target if target != "./" else root / Path(source).name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / source, place)
    return root


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running(commands: list[list[str]], cwd: Path, environment: dict[str, str]) -> Iterator[None]:
    """Processes with their children, ended in the other order."""
    started: list[subprocess.Popen[bytes]] = []
    with (cwd / "services.log").open("wb") as log:
        try:
            settings: dict[str, Any] = {"cwd": cwd, "env": environment, "stdout": log, "stderr": log, "start_new_session": True}
            started += [subprocess.Popen(command, **settings) for command in commands]
            yield
        finally:
            for process in reversed(started):
                process.send_signal(signal.SIGTERM)
            for process in reversed(started):
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@pytest.fixture
def databases() -> Iterator[dict[str, str]]:
    """A Postgres as the compose file makes it: URLs of `finetune` and `dagster`."""
    pgserver = pytest.importorskip("pgserver")
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to the user that Postgres runs as
    server = pgserver.get_server(folder, cleanup_mode="stop")
    plain = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg2")
    engine = sa.create_engine(plain, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql((DEPLOY / "postgres" / "databases.sql").read_text())
        connection.exec_driver_sql("CREATE DATABASE finetune")
    engine.dispose()
    yield {name: plain.set(database=name).render_as_string(hide_password=False) for name in ("finetune", "dagster")}
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


class Installation:
    """The compose file's Dagster services as processes on the image's files."""

    def __init__(self, image: Path, databases: dict[str, str]) -> None:
        self.image, self.services, self.code, self.web = image, compose()["services"], free_port(), free_port()
        workspace = image / "deploy" / "dagster" / "workspace.yaml"
        workspace.write_text(workspace.read_text().replace("port: 4000", f"port: {self.code}"))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FINETUNE_", "DAGSTER_"))}
        self.environment = inherited | {
            "PYTHONPATH": str(image),
            "FINETUNE_HOME": str(image / "data" / "store"),
            "FINETUNE_DATABASE_URL": databases["finetune"],
            "FINETUNE_SOURCE": databases["finetune"],
            "FINETUNE_USER_KEY": "a key",
            "DAGSTER_DATABASE_URL": databases["dagster"],
            "DAGSTER_HOME": str(image / "deploy" / "dagster"),
            "FINETUNE_CODE_HOST": "127.0.0.1",
            "HF_HUB_OFFLINE": "1",
        }

    def running(self, *names: str) -> Any:
        """These services, until the block ends."""
        return running([self._command(name) for name in names], self.image, self.environment)

    def _command(self, name: str) -> list[str]:
        own = {"4000": str(self.code), "3000": str(self.web), "0.0.0.0": "127.0.0.1"}
        words = [own.get(word, word.replace("/app/", f"{self.image}/")) for word in self.services[name]["command"]]
        return [str(Path(sys.executable).parent / words[0]), *words[1:]]

    def ask(self, query: str, **variables: Any) -> Any:
        """Dagster's GraphQL."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.web}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    def until(self, question: Any, seconds: float = 240) -> Any:
        """The first true answer; the services' log where there is none."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                if answer := question():
                    return answer
            time.sleep(1)
        raise AssertionError((self.image / "services.log").read_text()[-3000:])

    def answers(self, port: int) -> bool:
        """Whether somebody listens."""
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True


LOADED = "{ repositoriesOrError { ... on RepositoryConnection { nodes { location { name } } } } }"
PARTITIONS = '{ assetNodeOrError(assetKey: {path: ["rollout"]}) { ... on AssetNode { partitionKeys } } }'
LAUNCH = """
mutation ($params: ExecutionParams!) { launchPipelineExecution(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
} }"""
STATUS = "query ($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_code_location_daemon_and_webserver_work_together_on_postgres(image: Path, databases: dict[str, str]) -> None:
    """The daemon's sensor makes a partition for each assistant, a run asked for through GraphQL is done, Postgres knows it."""
    made = Installation(image, databases)
    with made.running("code"):
        made.until(lambda: made.answers(made.code))
        with made.running("daemon", "webserver"):
            made.until(lambda: "finetune_assets" in str(made.ask(LOADED)))
            made.until(lambda: {"dental", "restaurant"} <= set(made.ask(PARTITIONS)["assetNodeOrError"]["partitionKeys"]))
            selector = {"repositoryName": "__repository__", "repositoryLocationName": "finetune_assets"}
            wanted = {"selector": {**selector, "jobName": "weekly_report"}, "mode": "default", "runConfigData": {}}
            launched = made.ask(LAUNCH, params=wanted)["launchPipelineExecution"]
            assert launched["__typename"] == "LaunchRunSuccess", launched
            run = launched["run"]["runId"]

            def ended() -> str | None:
                status = made.ask(STATUS, id=run)["runOrError"]["status"]
                return status if status in ("SUCCESS", "FAILURE", "CANCELED") else None

            assert made.until(ended) == "SUCCESS"
    assert "# Week to" in (image / "data" / "store" / "serving" / "digest.md").read_text()
    engine = sa.create_engine(databases["dagster"])
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT status FROM runs WHERE run_id = :run"), {"run": run}).scalar() == "SUCCESS"
    engine.dispose()
    assert not (image / "data" / "store" / "ledger.db").exists()
