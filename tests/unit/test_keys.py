"""Where keys come from: the policy file, the environment, the command line, and the administrator's own."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from monitor.access import KeyScope
from monitor.config import Config
from serving.api.admin_key import FILE, AdminKeyError, ensure_admin_key, read_admin_digest
from serving.api.binding import AccessError
from serving.api.keyring import digest_of
from serving.api.keys import DIGEST_VARIABLE, VLLM_VARIABLE, ring_of, sender_digests, take_key_away
from serving.cli import app

POLICY = """\
version: "1"
detectors: [{artifact: a.safetensors}]
policies:
  - name: default
    on_gap: block
    on_uncalibrated: block
    rules: [{name: r, when: {detector: a, stage: prompt}, do: {action: block}, mode: enforce}]
"""


def config_of(**content: object) -> Config:
    rule = {"name": "r", "when": {"detector": "a", "stage": "prompt"}, "do": {"action": "block"}, "mode": "enforce"}
    policy = {"name": "default", "on_gap": "block", "on_uncalibrated": "block", "rules": [rule]}
    whole = {"version": "1", "detectors": [{"artifact": "a.safetensors"}], "policies": [policy], **content}
    return Config.model_validate(whole, strict=False)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TELLTALE_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


class TestTheAdministratorsKey:
    def test_is_made_once_and_kept_as_a_digest_that_only_its_owner_reads(self, state: Path) -> None:
        key = ensure_admin_key(state)
        assert key is not None
        assert ensure_admin_key(state) is None
        assert read_admin_digest(state) == digest_of(key)
        assert key not in (state / FILE).read_text()
        assert (state / FILE).stat().st_mode & 0o777 == 0o600

    def test_of_several_servers_at_once_one_makes_it(self, state: Path) -> None:
        made: list[str | None] = []
        threads = [threading.Thread(target=lambda: made.append(ensure_admin_key(state))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        keys = [key for key in made if key is not None]
        assert len(made) == 8
        assert [digest_of(key) for key in keys] == [read_admin_digest(state)]

    @pytest.mark.parametrize("mode", [0o644, 0o620, 0o606])
    def test_is_not_taken_from_a_file_that_others_may_use(self, state: Path, mode: int) -> None:
        ensure_admin_key(state)
        (state / FILE).chmod(mode)
        for attempt in (read_admin_digest, ensure_admin_key):
            with pytest.raises(AdminKeyError, match="others than you"):
                attempt(state)

    @pytest.mark.parametrize("content", ["", "abc", "0" * 63, f"{'0' * 64}\n{'1' * 64}", "é" * 64])
    def test_is_not_taken_from_what_is_no_digest(self, state: Path, content: str) -> None:
        state.mkdir()
        (state / FILE).write_text(content)
        (state / FILE).chmod(0o600)
        with pytest.raises(AdminKeyError, match="Remove it"):
            read_admin_digest(state)

    def test_that_cannot_be_kept_is_not_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(AdminKeyError, match="TELLTALE_STATE"):
            ensure_admin_key(tmp_path / "file" / "state")

    def test_counts_where_the_file_names_no_other(self, state: Path) -> None:
        key = ensure_admin_key(state)
        assert key is not None
        holder = ring_of(config_of()).holder_of(key)
        assert holder is not None
        assert holder.scopes == {KeyScope.OBSERVE, KeyScope.ADMIN}
        own = [{"name": "ops", "key_sha256": digest_of("own"), "scopes": ["admin"]}]
        ring = ring_of(config_of(access={"keys": own}))
        assert ring.holder_of(key) is None
        assert ring.holder_of("own") is not None


class TestTheEnvironment:
    def test_keeps_the_digest_of_a_key_and_not_the_key(self) -> None:
        environment = {VLLM_VARIABLE: "secret", "OTHER": "1"}
        take_key_away(environment)
        assert environment == {DIGEST_VARIABLE: digest_of("secret"), "OTHER": "1"}
        assert sender_digests((), environment) == (digest_of("secret"),)

    def test_without_a_key_stays_as_it_is(self) -> None:
        environment = {"OTHER": "1"}
        take_key_away(environment)
        assert environment == {"OTHER": "1"}
        assert sender_digests((), environment) == ()

    def test_comes_behind_the_command_line_as_for_vllm(self) -> None:
        assert sender_digests(["given", ""], {VLLM_VARIABLE: "env"}) == (digest_of("given"),)
        assert sender_digests([], {VLLM_VARIABLE: "env"}) == (digest_of("env"),)

    def test_gives_a_key_that_sends(self) -> None:
        ring = ring_of(config_of(), [digest_of("secret")])
        holder = ring.holder_of("secret")
        assert holder is not None
        assert holder.scopes == {KeyScope.INFER}

    def test_beside_tenants_is_nobodys(self) -> None:
        tenants = [{"name": "t", "key_sha256": digest_of("theirs"), "policy": "default"}]
        with pytest.raises(AccessError, match="nothing says whose"):
            ring_of(config_of(tenants=tenants), [digest_of("another")])
        assert ring_of(config_of(tenants=tenants), [digest_of("theirs")]).holder_of("theirs") is not None


class TestTheCommandLine:
    def test_a_new_key_goes_into_the_file_as_it_is_printed(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["key", "new", "--scope", "observe", "--scope", "admin", "--name", "ops"])
        assert result.exit_code == 0, result.output
        found = re.search(r"^key: (tt-\S+)$", result.output, re.MULTILINE)
        assert found is not None
        assert result.output.count(found[1]) == 1
        entry = result.output[result.output.index("access:") :]
        from monitor.yaml_file import read_policy_file

        (tmp_path / "p.yaml").write_text(POLICY + entry)
        (key,) = read_policy_file(tmp_path / "p.yaml").config.access.keys
        assert (key.name, key.key_sha256, key.scopes) == (
            "ops",
            digest_of(found[1]),
            (KeyScope.OBSERVE, KeyScope.ADMIN),
        )

    @pytest.mark.parametrize("scopes", [[], ["--scope", "root"]])
    def test_a_key_says_what_it_is_good_for(self, scopes: list[str]) -> None:
        assert CliRunner().invoke(app, ["key", "new", *scopes]).exit_code == 2

    @pytest.mark.parametrize("flag", ["--api-key=sk-1", "--api_key=sk-1"])
    def test_no_key_stands_in_the_list_of_processes(self, tmp_path: Path, flag: str) -> None:
        (tmp_path / "p.yaml").write_text(POLICY)
        result = CliRunner().invoke(app, ["serve", "m", "--policy", str(tmp_path / "p.yaml"), flag])
        assert "VLLM_API_KEY" in str(result.exception)
        assert "sk-1" not in str(result.exception)

    def test_no_server_for_everybody_by_mistake(self, tmp_path: Path, state: Path) -> None:
        (tmp_path / "p.yaml").write_text(POLICY)
        result = CliRunner().invoke(app, ["serve", "m", "--policy", str(tmp_path / "p.yaml"), "--host", "0.0.0.0"])  # noqa: S104
        assert "telltale key new" in str(result.exception)
        assert not os.path.lexists(state)
