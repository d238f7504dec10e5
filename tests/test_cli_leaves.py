"""tpinv leaves: which numbers of leaves serve, what forbids the others, what to pad."""

import json

import pytest

from tpinv.cli import main

LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
QWEN3 = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}


@pytest.fixture
def leaves(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)

    def run(config, *arguments) -> tuple[int, str, str]:
        if config is not None:
            (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        status = main(["leaves", *(["--model", "config.json"] if config is not None else []), *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def test_llama(leaves):
    status, out, _ = leaves(LLAMA, "--tp", "1,2,4,8")
    assert status == 0 and "use leaves=8, the smallest and fastest" in out
    assert "hidden 4096, ffn 14336, heads 32, kv-heads 8, head-dim 128, vocab 128256; TP = 1, 2, 4, 8" in out
    assert "vocabulary = 128256" in out, "40 leaves are forbidden by it"


def test_qwen3_has_heads_of_another_width(leaves):
    status, out, _ = leaves(QWEN3, "--tp", "1,2,4")
    assert status == 0 and "use leaves=4" in out and "head-dim 128" in out


def test_a_size_that_no_leaves_serve(leaves):
    status, out, err = leaves(LLAMA, "--tp", "1,2,3")
    assert status == 2 and err.count("\n") == 1
    assert "TP=3 is forbidden by 32 heads, 8 kv-heads" in out and "ffn = 14336" in out
    assert "pad kv-heads 8 to 12 and heads 32 to 48 (with zero weights); ffn 14336 to 14352, then use leaves=6" in err


@pytest.mark.parametrize("padded", [{"intermediate_size": 14352, "num_attention_heads": 48, "num_key_value_heads": 12, "head_dim": 128}])
def test_what_is_recommended_serves(padded, leaves):
    status, out, _ = leaves(LLAMA | padded, "--tp", "1,2,3")
    assert status == 0 and "use leaves=6, the smallest and fastest; it serves TP = 6 as well" in out


def test_a_vocabulary_alone(leaves):
    status, _, err = leaves(LLAMA | {"vocab_size": 32001}, "--tp", "1,2")
    assert status == 2 and "pad vocab 32001 to 32002, then use leaves=2" in err


def test_explicit_dimensions_and_a_directory(leaves, tmp_path):
    named = ["--hidden", 64, "--ffn", 192, "--heads", 6, "--head-dim", 16, "--vocab", 96]
    assert leaves(None, *named, "--tp", "1,3,6")[0] == 0
    assert leaves(LLAMA, "--vocab", 32001, "--tp", "1,2")[0] == 2, "what is named goes before the file"
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert main(["leaves", "--model", str(tmp_path)]) == 0


def test_gpt2(leaves):
    status, out, _ = leaves({"n_embd": 768, "n_head": 12, "vocab_size": 50256}, "--tp", "1,2,3")
    assert status == 0 and "ffn 3072" in out


@pytest.mark.parametrize(
    "config, arguments, message",
    [
        (None, [], "name a config.json by --model, or dimensions"),
        (None, ["--model", "nowhere.json"], "nowhere.json cannot be read: No such file"),
        (None, ["--hidden", 64, "--ffn", 64], "has no --heads, --vocab"),
        ("{", [], "config.json is no JSON"),
        ("[1]", [], "holds a list"),
        (LLAMA | {"num_local_experts": 8}, [], "is a mixture of experts (num_local_experts=8)"),
        (LLAMA | {"vocab_size": "many"}, [], "vocab is 'many'"),
        (LLAMA | {"hidden_size": True}, [], "hidden is True"),
        (LLAMA | {"num_attention_heads": 0}, [], "heads is 0"),
        (LLAMA | {"num_key_value_heads": 5}, [], "32 heads are no multiple of 5 kv-heads"),
        (LLAMA | {"hidden_size": 4097}, [], "hidden 4097 is no multiple of 32 heads; name --head-dim"),
        (LLAMA, ["--tp", "0"], "--tp '0' holds 0"),
        (LLAMA, ["--tp", "2,2"], "names a size twice"),
        (LLAMA, ["--tp", "a"], "must be integers"),
        (LLAMA, ["--ffn", "-1"], "ffn is -1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(config, arguments, message, leaves):
    status, out, err = leaves(config, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1 and out == ""
