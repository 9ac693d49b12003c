"""Assistants' YAML: defaults, inheritance, and errors that name file, line and what is allowed."""

from pathlib import Path

import pytest

from finetune_assets.assistants import assistant_names, load_assistant
from finetune_assets.environment import ROOT
from finetune_assets.errors import SettingsError, UnknownAssistant

SHIPPED = ROOT / "finetune_assets" / "assistants"


def write(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def test_one_line_is_enough(tmp_path: Path) -> None:
    write(tmp_path, "spa", "select: {vertical: spa}\n")
    settings = load_assistant(tmp_path, "spa")
    assert settings.select.vertical == "spa"
    assert (settings.base_model, settings.trainer, settings.min_examples) == ("data/base_model", "local", 100)


@pytest.mark.parametrize("name", assistant_names(SHIPPED))
def test_shipped_assistants_load(name: str) -> None:
    settings = load_assistant(SHIPPED, name)
    assert settings.system_prompt
    assert settings.rules


def test_a_tenant_without_a_file_inherits_its_vertical(tmp_path: Path) -> None:
    write(tmp_path, "dental", "select: {vertical: dental}\nmin_examples: 7\nfilters: {min_satisfaction: 5}\n")
    settings = load_assistant(tmp_path, "clinic_a", {"clinic_a": "dental"})
    assert (settings.select.tenant, settings.select.vertical) == ("clinic_a", None)
    assert (settings.min_examples, settings.filters.min_satisfaction) == (7, 5)


def test_a_tenants_file_wins_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, "dental", "select: {vertical: dental}\nlanguage: pt\nfilters: {min_satisfaction: 5, context_turns: 3}\n")
    write(tmp_path, "clinic_a", "select: {tenant: clinic_a}\nfilters: {context_turns: 6}\n")
    settings = load_assistant(tmp_path, "clinic_a", {"clinic_a": "dental"})
    assert settings.language == "pt"
    assert (settings.filters.min_satisfaction, settings.filters.context_turns) == (5, 6)
    assert load_assistant(tmp_path, "clinic_a", {}).language == "es"  # the vertical is known only from data


def test_extends_by_name_and_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path, "a", "select: {vertical: x}\nextends: b\n")
    write(tmp_path, "b", "select: {vertical: x}\nmin_examples: 9\n")
    assert load_assistant(tmp_path, "a").min_examples == 9
    write(tmp_path, "b", "select: {vertical: x}\nextends: a\n")
    with pytest.raises(SettingsError, match="circle"):
        load_assistant(tmp_path, "a")
    write(tmp_path, "a", "select: {vertical: x}\nextends: nobody\n")
    with pytest.raises(SettingsError, match="names no file"):
        load_assistant(tmp_path, "a")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("select: {vertical: x}\nfilterz: {}\n", 2, "unknown key `filterz`; allowed here: adapter, augment"),
        ("select: {vertical: x}\nfilters:\n  user_char: 3\n", 3, "unknown key `filters.user_char`"),
        ("select: {vertical: x}\nlanguage: fr\n", 2, "'es', 'en' or 'pt'"),
        ("select: {vertical: x}\nmin_examples: many\n", 2, "valid integer"),
        ("select: {vertical: x, tenant: y}\n", 1, "exactly one"),
        ("language: es\n", 1, "`select` is missing"),
        ("select: {vertical: x}\nfilters: {reply_chars: [9, 3]}\n", 2, "above the most"),
        ("select: {vertical: x}\nrules:\n  - name: a\n    contains_any: ['(']\n", 3, "not a regular expression"),
        ("select: {vertical: x}\nsplit: {train: 0.5}\n", 2, "must be 1"),
        ("- a list\n", 1, "mapping"),
        ("name: x\nselect: {vertical: x}\n", 1, "the file's name"),
    ],
)
def test_errors_name_file_line_and_what_is_allowed(tmp_path: Path, text: str, line: int, says: str) -> None:
    write(tmp_path, "bad", text)
    with pytest.raises(SettingsError) as raised:
        load_assistant(tmp_path, "bad")
    assert f"bad.yaml:{line}:" in str(raised.value)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    "url", ["not a url", "api.openai.com/v1", "ftp://host/v1", "https:///v1", "http://[::1/v1", "https://host:none/v1"]
)
def test_an_address_is_one(tmp_path: Path, url: str) -> None:
    for text in (f"remote: {{base_url: '{url}'}}", f"augment: {{llm: {{model: m, base_url: '{url}'}}}}"):
        write(tmp_path, "bad", f"select: {{vertical: x}}\n{text}\n")
        with pytest.raises(SettingsError, match=r"bad\.yaml:2: .*begins with http:// or https:// and a host"):
            load_assistant(tmp_path, "bad")


@pytest.mark.parametrize("url", ["https://user:s3cret@host/v1", "https://user:s3/cret@host/v1"])
def test_a_password_in_an_address_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    write(tmp_path, "bad", f"select: {{vertical: x}}\nremote: {{base_url: '{url}'}}\n")
    with pytest.raises(SettingsError, match=r"remote\.base_url: 'https://\[…\]@host/v1'") as raised:
        load_assistant(tmp_path, "bad")
    assert "cret" not in str(raised.value)


def test_broken_yaml_and_missing_things(tmp_path: Path) -> None:
    write(tmp_path, "broken", "select: {vertical: x\n")
    with pytest.raises(SettingsError, match="not readable as YAML"):
        load_assistant(tmp_path, "broken")
    with pytest.raises(UnknownAssistant, match="has no file"):
        load_assistant(tmp_path, "nobody")
    with pytest.raises(SettingsError, match="is no folder"):
        assistant_names(tmp_path / "absent")
