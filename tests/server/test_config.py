from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from loraplex_server.config import Config, ConfigError
from loraplex_server.config_sources import SECRETS, load_config
from loraplex_server.setting_values import limit_of


def write_toml(folder: Path, text: str) -> str:
    path = folder / "loraplex.toml"
    path.write_text(text)
    return str(path)


def test_no_sources_give_the_defaults():
    assert load_config([], {}) == Config()


def test_flags_win_over_environment_over_file_over_defaults(tmp_path):
    path = write_toml(tmp_path, 'port = 1\nmax_running = 2\ndtype = "float32"\n')
    env = {"LORAPLEX_PORT": "3", "LORAPLEX_MAX_RUNNING": "4"}
    config = load_config(["--port", "5", "--config", path], env)
    assert (config.port, config.max_running, config.dtype) == (5, 4, "float32")
    assert config.max_step_tokens == Config().max_step_tokens


def test_the_file_can_be_named_by_the_environment(tmp_path):
    path = write_toml(tmp_path, "port = 1\n")
    assert load_config([], {"LORAPLEX_CONFIG": path}).port == 1


@pytest.mark.parametrize(
    ("argv", "env", "toml", "message"),
    [
        (["--prot=1"], {}, "", "--prot; did you mean --port"),
        ([], {"LORAPLEX_PROT": "1"}, "", "LORAPLEX_PROT; did you mean LORAPLEX_PORT"),
        ([], {}, "prot = 1", "prot; did you mean port"),
        (["extra"], {}, "", "unknown argument extra"),
        (["--port", "x"], {}, "", "--port must be a whole number"),
        (["--port", "70000"], {}, "", "at most 65535"),
        ([], {"LORAPLEX_DTYPE": "int4"}, "", "LORAPLEX_DTYPE must be one of auto, float32"),
        ([], {}, "port = true", "key `port` of the configuration file must be"),
        ([], {}, 'pool_bytes = "many"', "auto, or a size such as 512MiB"),
        ([], {}, "request_timeout_s = 0", "number of seconds above 0"),
        (["--ttft-slo-s", "0"], {}, "", "off, or a number of seconds above 0"),
        (["--cluster-wait-s", "-1"], {}, "", "a number of seconds, 0 or above"),
        (["--cluster-wait-s", "nan"], {}, "", "a number of seconds, 0 or above"),
        (["--host-bytes", "-1"], {}, "", "auto, or 0, or a size such as 512MiB"),
        (["--prefix-cache", "yes"], {}, "", "--prefix-cache must be on or off"),
        (["--order", "fair"], {}, "", "one of vtc, vtc-adapter, fcfs, lcfs, edf"),
        (["--tenant-header", "x tenant"], {}, "", "the name of an HTTP header"),
        (["--tenant-weights", "gold"], {}, "", "names with weights above 0"),
        (["--tenant-weights", "gold=0"], {}, "", "names with weights above 0"),
        (["--tenant-weights", "=1"], {}, "", "names with weights above 0"),
        (["--tenant-weights", "a=1,a=2"], {}, "", "names with weights above 0"),
        ([], {}, "tenant_weights = 3", "names with weights above 0"),
        (["--tenant-max-adapters", "3,a=x"], {}, "", "a whole number"),
        (["--tenant-max-adapters", "3,4"], {}, "", "such as 1000,gold=5000"),
        (
            ["--tenant-weights", "a=1", "--tenant-header", "x", "--order", "fcfs"],
            {},
            "",
            "nothing with order fcfs",
        ),
        ([], {}, "port = ", "is not TOML"),
        (["--port"], {}, "", "expected one argument"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, argv, env, toml, message):
    argv = [*argv, "--config", write_toml(tmp_path, toml)] if toml else argv
    with pytest.raises(ConfigError) as caught:
        load_config(argv, env)
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(["--config", str(tmp_path / "none.toml")], {})


def test_the_variables_of_the_sdk_are_left_alone():
    env = {"LORAPLEX_BASE_URL": "http://x", "HOME": "/h"}
    assert load_config([], env) == Config()


def test_what_kubernetes_says_of_a_service_named_loraplex_is_ignored():
    env = {
        "LORAPLEX_SERVICE_HOST": "10.0.0.1",
        "LORAPLEX_SERVICE_PORT": "8000",
        "LORAPLEX_SERVICE_PORT_HTTP": "8000",
        "LORAPLEX_PORT": "tcp://10.0.0.1:8000",
        "LORAPLEX_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "LORAPLEX_PORT_8000_TCP_PROTO": "tcp",
        "LORAPLEX_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert load_config([], env) == Config()
    assert load_config([], {"LORAPLEX_PORT": "udp://10.0.0.1:8000"}) == Config()
    assert load_config([], {"LORAPLEX_PORT": "9"}).port == 9
    with pytest.raises(ConfigError, match="LORAPLEX_SERVICE_NAME"):
        load_config([], {"LORAPLEX_SERVICE_NAME": "x"})


def test_the_key_comes_from_the_environment_or_the_file_and_is_never_shown(tmp_path):
    config = load_config([], {"LORAPLEX_API_KEY": "secret\n"})
    assert config.api_key == "secret"
    assert "secret" not in repr(config)
    path = write_toml(tmp_path, 'api_key = "from-file"\n')
    assert load_config(["--config", path], {}).api_key == "from-file"
    with pytest.raises(ConfigError, match="unknown argument --api-key"):
        load_config(["--api-key", "secret"], {})
    with pytest.raises(ConfigError, match="LORAPLEX_API_KEY must be") as caught:
        load_config([], {"LORAPLEX_API_KEY": "sec\u00e9ret"})
    assert "ret" not in str(caught.value).partition("must be")[2].replace("character", "")


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("4096", 4096), ("auto", None)],
)
def test_sizes_are_read_with_their_units(text, size):
    assert load_config(["--pool-bytes", text], {}).pool_bytes == size


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("--host-bytes", "auto", None),
        ("--host-bytes", "0", 0),
        ("--host-bytes", "1GiB", 1 << 30),
        ("--prefix-cache", "off", False),
        ("--prefix-cache", "on", True),
        ("--cluster-wait-s", "0", 0.0),
        ("--cluster-wait-s", "0.05", 0.05),
        ("--ttft-slo-s", "off", None),
        ("--ttft-slo-s", "1.5", 1.5),
        ("--order", "edf", "edf"),
        ("--eviction", "lru", "lru"),
        ("--admission", "worst-case", "worst-case"),
        ("--tenant-header", "X-Tenant", "x-tenant"),
        ("--tenant-tokens-per-minute", "60000", 60000),
        ("--max-queued-per-tenant", "8", 8),
    ],
)
def test_words_and_numbers_of_memory_and_scheduling_are_read(flag, text, value):
    config = load_config([flag, text], {})
    assert getattr(config, flag.removeprefix("--").replace("-", "_")) == value


def test_a_toml_file_may_say_them_in_its_own_types(tmp_path):
    lines = ["prefix_cache = false", "host_bytes = 0", 'tenant_header = "x-tenant"']
    path = write_toml(tmp_path, "\n".join([*lines, "tenant_weights = {gold = 3, free = 0.5}"]))
    config = load_config(["--config", path], {})
    assert (config.prefix_cache, config.host_bytes) == (False, 0)
    assert config.tenant_weights == {"gold": 3.0, "free": 0.5}
    flags = ["--config", path, "--tenant-weights", "gold=2, new=1"]
    assert load_config(flags, {}).tenant_weights == {"gold": 2.0, "new": 1.0}


def test_every_setting_has_a_flag_unless_it_is_secret_and_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"], {})
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for setting in fields(Config):
        flag = "--" + setting.name.replace("_", "-")
        assert (flag in shown) == (setting.name not in SECRETS)
        assert flag in shown or f"LORAPLEX_{setting.name.upper()}" in shown


def test_the_data_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert Config().data_dir == tmp_path / "loraplex"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert Config().data_dir == Path.home() / ".loraplex"


def test_a_shared_registry_wants_a_shared_place_for_files():
    env = {"LORAPLEX_REGISTRY_URL": "postgresql://db/x"}
    with pytest.raises(ConfigError, match="--blob-url s3://"):
        load_config([], env)
    assert load_config(["--blob-url", "s3://bucket/folder"], env).registry_url


def test_a_misspelt_place_for_files_is_not_taken_for_a_folder(tmp_path):
    for url in ("s3:/bucket/folder", "bucket/folder"):
        with pytest.raises(ConfigError, match="--blob-url must be a URL such as s3://"):
            load_config(["--blob-url", url], {})
    for url in ("s3://bucket/folder", str(tmp_path), "~/files"):
        assert load_config(["--blob-url", url], {}).blob_url == url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("collector:4318", "a URL such as http://localhost:4318"),
        ("http://", "a URL such as"),
        ("https://me:secret@collector", "OTEL_EXPORTER_OTLP_HEADERS"),
    ],
)
def test_a_collector_is_named_by_a_url_without_a_password(url, message):
    with pytest.raises(ConfigError, match=message) as refused:
        load_config(["--otlp-endpoint", url], {})
    assert "secret" not in str(refused.value)
    good = "https://collector.example:4318"
    assert load_config(["--otlp-endpoint", good], {}).otlp_endpoint == good


@pytest.mark.parametrize(
    ("raw", "limits"),
    [
        ("3", 3),
        ("3,gold=5", {"*": 3, "gold": 5}),
        ("gold=5", {"gold": 5}),
        ("*=3,gold=0", {"*": 3, "gold": 0}),
    ],
)
def test_limits_may_differ_by_tenant(raw, limits, tmp_path):
    config = load_config(["--tenant-requests-per-minute", raw], {})
    assert config.tenant_requests_per_minute == limits
    assert limit_of(config.tenant_requests_per_minute, "gold") == (
        limits if isinstance(limits, int) else limits["gold"]
    )
    path = write_toml(tmp_path, '[tenant_max_adapter_bytes]\n"*" = "1GiB"\ngold = 7\n')
    by_table = load_config(["--config", path], {}).tenant_max_adapter_bytes
    assert (limit_of(by_table, "gold"), limit_of(by_table, "other")) == (7, 1 << 30)
