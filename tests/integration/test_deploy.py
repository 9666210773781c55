"""Image, compose file and Kubernetes example: what linters and schemas say of them, and facts that no linter knows.

None of them is run here: there is no container engine. What can be wrong in them without one is looked at.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from jef_daemon import config
from jef_daemon.errors import SettingsError
from jef_daemon.settings import Settings
from jef_daemon.units import stop_within_s
from jef_daemon.web import app

ROOT = Path(__file__).resolve().parents[2]
DOCKER, KUBERNETES = ROOT / "deploy/docker", ROOT / "deploy/kubernetes"
TOOLS = Path(sys.executable).parent

# --- the image ---------------------------------------------------------------------------------------------------

DOCKERFILE = (DOCKER / "Dockerfile").read_text()
INSTRUCTIONS = [
    (found[1], " ".join(found[2].split()))
    for found in re.finditer(
        r"^([A-Z]+) ((?:.*\\\n)*.*)$", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE), re.MULTILINE
    )
]
LAST = INSTRUCTIONS[max(at for at, (word, _) in enumerate(INSTRUCTIONS) if word == "FROM") :]
ENVIRONMENT = dict(re.findall(r"(JEF_\w+)=(\S+)", " ".join(text for word, text in LAST if word == "ENV")))


def only(word: str) -> str:
    """What the last stage says, once."""
    (found,) = [text for instruction, text in LAST if instruction == word]
    return found


def test_hadolint_finds_nothing() -> None:
    subprocess.run([TOOLS / "hadolint", DOCKER / "Dockerfile"], check=True)
    wrong = DOCKERFILE.replace('CMD ["run"]', "CMD run")
    told = subprocess.run([TOOLS / "hadolint", "-"], input=wrong, capture_output=True, text=True, check=False)
    assert "DL3025" in told.stdout


def test_what_is_copied_is_there_and_is_sent() -> None:
    """`Dockerfile.dockerignore` leaves everything out but what it names."""
    sources = [
        source
        for word, text in INSTRUCTIONS
        if word == "COPY" and "--from" not in text
        for source in text.split()[:-1]
    ]
    sent = [
        line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    ]
    assert "requirements.lock" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in sent), source
    assert all((ROOT / path).exists() for path in sent)


def test_nothing_is_installed_that_is_in_no_lock_file() -> None:
    """Each installation wants hashes, but for our own wheel, which brings nothing with it."""
    runs = [step for word, text in INSTRUCTIONS if word == "RUN" for step in text.split("&&")]
    installs = [step for step in runs if re.search(r"\bpip\b.*\binstall\b", step)]
    assert len(installs) == 3
    assert all("--require-hashes -r" in step or "--no-deps /tmp/wheel" in step for step in installs)


def test_it_is_small_and_not_root() -> None:
    """The last stage takes only the environment from the one before; numbers, as Kubernetes cannot look up names."""
    assert [text for word, text in LAST if word == "COPY"] == ["--from=build /opt/jef /opt/jef"]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", only("USER"))
    assert f"--uid {only('USER').partition(':')[0]}" in only("RUN")


def test_it_is_stopped_and_asked_as_the_daemon_expects() -> None:
    """Exec form, so that SIGTERM reaches the daemon; the health check asks the port that is opened."""
    assert json.loads(only("ENTRYPOINT")) == ["tini", "--", "jef"]
    assert json.loads(only("CMD")) == ["run"]
    assert only("STOPSIGNAL") == "SIGTERM"
    check = json.loads(only("HEALTHCHECK").partition("CMD ")[2])
    assert f"http://127.0.0.1:{ENVIRONMENT['JEF_HTTP_PORT']}/livez" in check[-1]
    compile(check[-1], "health check", "exec")
    assert only("EXPOSE") == ENVIRONMENT["JEF_HTTP_PORT"]


def test_its_variables_are_settings_and_its_folders_theirs() -> None:
    settings = config.load(Path("/dev/null"), {}, ENVIRONMENT)
    assert str(settings.data_dir) == only("VOLUME")
    assert f"install -d -o jef -g jef -m 0750 {settings.data_dir} " in only("RUN")
    assert f"install -d -m 0755 {config.SYSTEM_FILE.parent}" in only("RUN")


# --- compose -----------------------------------------------------------------------------------------------------

COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def conforms(document: Path) -> subprocess.CompletedProcess[str]:
    """Whether a file is as the compose specification has it, whose schema the checker brings."""
    words = ["--builtin-schema", "vendor.compose-spec", str(document)]
    return subprocess.run([TOOLS / "check-jsonschema", *words], capture_output=True, text=True, check=False)


def test_compose_conforms_to_its_specification(tmp_path: Path) -> None:
    told = conforms(DOCKER / "compose.yaml")
    assert told.returncode == 0, told.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DOCKER / "compose.yaml").read_text().replace("stop_grace_period", "stop_grace_time"))
    assert "stop_grace_time" in conforms(wrong).stdout


def mounts(service: str) -> list[tuple[str, str, str]]:
    """What a service sees: source, place in the container, options."""
    parts = [[*text.split(":"), ""] for text in SERVICES[service].get("volumes", [])]
    return [(source, place, options) for source, place, options, *_ in parts]


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_needs_is_there(name: str) -> None:
    """Files are there and cannot be written to; volumes, networks and services that it names are declared."""
    service = SERVICES[name]
    for source, _, options in mounts(name):
        if source.startswith("."):
            assert (DOCKER / source).exists(), source
            assert options == "ro", source
        else:
            assert source in COMPOSE["volumes"]
    assert set(service.get("networks", [])) <= set(COMPOSE["networks"])
    assert set(service.get("depends_on", {})) <= set(SERVICES)
    for other, how in service.get("depends_on", {}).items():
        assert (
            how["condition"] != "service_healthy" or SERVICES[other].get("healthcheck") or other == "daemon"
        )


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_open_to_this_machine_only(name: str) -> None:
    """And its image is of a version that is named."""
    service = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    image = service["image"]
    assert image == "jef-daemon" or re.search(r"/\w+:v?\d+(\.\d+)*", image), image
    assert name == "prepare" or service["security_opt"] == ["no-new-privileges:true"]


def test_the_daemon_of_compose() -> None:
    """Its settings are settings, it stops in time, it writes only where it may."""
    daemon = SERVICES["daemon"]
    settings = config.load(DOCKER / "jef.toml", {}, ENVIRONMENT | daemon["environment"])
    assert settings.amqp_url.get_secret_value() == "amqp://jef-daemon@rabbitmq:5672/"
    assert seconds(daemon["stop_grace_period"]) >= stop_within_s(settings)
    assert "user" not in daemon
    assert (daemon["read_only"], daemon["cap_drop"], daemon["tmpfs"]) == (True, ["ALL"], ["/tmp"])
    assert ("daemon", str(settings.data_dir), "") in mounts("daemon")
    assert ("./jef.toml", daemon["environment"]["JEF_CONFIG"], "ro") in mounts("daemon")


def test_the_page_says_how_long_to_wait() -> None:
    page = (ROOT / "docs/deploy.md").read_text()
    wanted = str(stop_within_s(Settings()))
    assert f"at most {wanted} s with the defaults" in page
    assert f"--stop-timeout {wanted} " in page


def seconds(text: str) -> float:
    assert text.endswith("s")
    return float(text.removesuffix("s"))


def test_prometheus_and_grafana_find_each_other_and_the_daemon() -> None:
    """The names are services', the ports theirs; but for the address the datasource is the one of the other set-up."""
    targets = yaml.safe_load((DOCKER / "targets/jef.yml").read_text())
    assert targets == [{"targets": [f"daemon:{ENVIRONMENT['JEF_HTTP_PORT']}"]}]
    ours = yaml.safe_load((DOCKER / "datasource.yml").read_text())
    theirs = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/jef.yml").read_text())
    assert ours["datasources"][0].pop("url") == "http://prometheus:9090"
    theirs["datasources"][0].pop("url")
    assert ours == theirs
    shown = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/jef.yml").read_text())
    place = shown["providers"][0]["options"]["path"]
    assert ("../grafana/dashboards", place, "ro") in mounts("grafana")
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert all(rule.startswith("rules/") for rule in scraped["rule_files"])
    assert scraped["scrape_configs"][0]["file_sd_configs"][0]["files"] == ["targets/*.yml"]


def test_what_is_prepared_is_what_the_services_read(tmp_path: Path) -> None:
    """`prepare.sh`, run: a file for each that names one, nobody else's to read; run again it changes no password."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("JEF_")},
        "PATH": f"{TOOLS}:{os.environ['PATH']}",
        "JEF_CONFIG": str(DOCKER / "jef.toml"),
    }
    folder = tmp_path / "jef"
    prepare = ["/bin/sh", str(DOCKER / "prepare.sh"), str(folder)]
    subprocess.run(prepare, check=True, env=environment)
    before = {path: path.read_bytes() for path in (folder / "users").iterdir()}
    subprocess.run(prepare, check=True, env=environment)
    assert {path: path.read_bytes() for path in (folder / "users").iterdir()} == before
    named = re.findall(r"/run/jef/([\w.-]+)", (DOCKER / "compose.yaml").read_text())
    named += re.findall(r"/run/jef/([\w.-]+)", (DOCKER / "rabbitmq.conf").read_text())
    assert sorted(named) == ["definitions.json", "grafana", "jef-daemon", "postgres"]
    for name in named:
        mode = stat.S_IMODE((folder / name).stat().st_mode)
        assert mode == (0o644 if name == "definitions.json" else 0o600), name
    queues = {queue["name"] for queue in json.loads((folder / "definitions.json").read_text())["queues"]}
    assert "jef.jobs.nap" in queues
    assert (folder / "jef-daemon").read_bytes() == before[folder / "users" / "jef-daemon"]


# --- Kubernetes --------------------------------------------------------------------------------------------------

RESOURCES = list(yaml.safe_load_all((KUBERNETES / "jef-daemon.yaml").read_text()))
BY_KIND = {resource["kind"]: resource for resource in RESOURCES}
POD = BY_KIND["StatefulSet"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_the_resources_conform_to_kubernetes(version: str) -> None:
    """An old release still met, and the newest that the checker knows; strictly: no key that there is not."""
    for resource in RESOURCES:
        kubernetes_validate.validate(resource, version, strict=True)
    wrong = copy.deepcopy(BY_KIND["StatefulSet"])
    wrong["spec"]["template"]["spec"]["terminationGraceSeconds"] = 60
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_names_and_labels_meet() -> None:
    """Selectors find the pods; what the pod mounts is there; the monitor names the pod's port."""
    labels = BY_KIND["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    monitor = yaml.safe_load((KUBERNETES / "pod-monitor.yaml").read_text())
    selectors = [
        BY_KIND["StatefulSet"]["spec"]["selector"]["matchLabels"],
        BY_KIND["Service"]["spec"]["selector"],
        BY_KIND["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        monitor["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector == labels for selector in selectors)
    assert BY_KIND["StatefulSet"]["spec"]["serviceName"] == BY_KIND["Service"]["metadata"]["name"]
    claims = {claim["metadata"]["name"] for claim in BY_KIND["StatefulSet"]["spec"]["volumeClaimTemplates"]}
    volumes = {volume["name"] for volume in POD["volumes"]} | claims
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == volumes
    (port,) = CONTAINER["ports"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], port["containerPort"]) == (port["name"], int(ENVIRONMENT["JEF_HTTP_PORT"]))
    annotations = BY_KIND["StatefulSet"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == ENVIRONMENT["JEF_HTTP_PORT"]
    (ingress,) = BY_KIND["NetworkPolicy"]["spec"]["ingress"]
    assert ingress["ports"] == [{"protocol": "TCP", "port": port["containerPort"]}]


def test_the_pod_may_little_and_stops_in_time() -> None:
    security = POD["securityContext"]
    uid = int(only("USER").partition(":")[0])
    assert (security["runAsNonRoot"], security["runAsUser"], security["fsGroup"]) == (True, uid, uid)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["automountServiceAccountToken"] is False
    assert POD["terminationGracePeriodSeconds"] >= stop_within_s(kubernetes_settings())


def kubernetes_settings() -> Settings:
    """The configuration of the example, with the image's variables."""
    values = tomllib.loads(BY_KIND["ConfigMap"]["data"]["jef.toml"])
    return Settings.model_validate(values | {"data_dir": ENVIRONMENT["JEF_DATA_DIR"]})


def test_the_pods_files_are_where_the_settings_look() -> None:
    places = {mount["name"]: Path(mount["mountPath"]) for mount in CONTAINER["volumeMounts"]}
    settings = kubernetes_settings()
    assert places["data"] == settings.data_dir
    assert places["config"] / "jef.toml" == config.SYSTEM_FILE
    assert settings.amqp_password_file == places["secret"] / "amqp-password"
    assert set(BY_KIND["Secret"]["stringData"]) == {"amqp-password"}
    assert BY_KIND["Secret"]["stringData"]["amqp-password"] == "", "no secret belongs here"


def test_the_probes_ask_what_there_is() -> None:
    """Alive: without the broker, or every daemon would be restarted when the broker is away."""
    routes = Path(app.__file__).read_text()
    for probe, path in (
        ("startupProbe", "/livez"),
        ("livenessProbe", "/livez"),
        ("readinessProbe", "/readyz"),
    ):
        assert CONTAINER[probe]["httpGet"] == {"path": path, "port": "http"}
        assert f'"{path}"' in routes


def test_the_variables_of_services_would_be_refused() -> None:
    """Kubernetes makes some for each service; those of one called jef-… look like settings. So the pod takes none."""
    with pytest.raises(SettingsError, match="JEF_DAEMON_SERVICE_HOST"):
        config.load(Path("/dev/null"), {}, {"JEF_DAEMON_SERVICE_HOST": "10.0.0.1"})
    assert POD["enableServiceLinks"] is False
