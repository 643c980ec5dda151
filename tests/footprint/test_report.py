"""What the calculator prints: limits said, nothing dropped without a word, units of the right size."""

from refimpl.__main__ import main

LLAMA = "meta-llama/Meta-Llama-3-8B"
GPT2 = "openai-community/gpt2"


def run(capsys, *arguments):
    code = main(["footprint", *arguments])
    return code, capsys.readouterr().out


def row(text, name):
    """The numbers of the row of this name."""
    line = next(line for line in text.splitlines() if line.startswith(name))
    return [float(word.replace(",", "")) for word in line.removeprefix(name).split() if word != "fits"]


def test_amp_is_said_and_is_of_float32(capsys):
    amp = [GPT2, "--train", "full", "--amp"]
    shown = {run(capsys, *amp, *dtype)[1] for dtype in ([], ["--dtype", "float32"])}
    assert len(shown) == 1 and "float32 under bfloat16 autocast" in shown.pop()


def test_the_cache_outweighs_the_weights_only_where_it_can(capsys):
    from_batch = "within the context of 8,192 tokens (from batch 15 on it does)"
    assert from_batch in run(capsys, LLAMA)[1] and from_batch in run(capsys, LLAMA, "--batch", "14")[1]
    assert "outweighs the weights from 8,169 tokens on" in run(capsys, LLAMA, "--batch", "15")[1]


def test_weights_that_do_not_fit_alone(capsys):
    code, out = run(capsys, LLAMA, "--length", "8192", "--gpu", "8GB")
    assert code == 1 and "the weights alone, 16.06 GB (14.96 GiB), do not fit" in out and "largest" not in out
    assert [line.split()[0] for line in out.splitlines() if line.endswith("  fits")] == ["4-bit"]
    assert "more GPUs: 3 at the least" in out
    out = run(capsys, LLAMA, "--length", "8192", "--gpu", "17GB")[1]
    assert "at 8,192 tokens: not even 1 fits" in out and "at batch 1: 2,048 tokens" in out
    out = run(capsys, LLAMA, "--dtype", "float32", "--length", "8192", "--gpu", "8GB")[1]
    need = max(row(run(capsys, LLAMA, "--length", "8192")[1], "total"))
    assert row(out, "16-bit weights, and all else") == [16.06, need]


def test_with_zero_on_nothing_vanishes(capsys):
    zero = [LLAMA, "--train", "full", "--zero", "1", "--world", "8", "--gpu", "24GB"]
    out = run(capsys, *zero)[1]
    one = run(capsys, LLAMA, "--train", "lora", "--length", "4096")[1]
    for way in ("LoRA", "QLoRA", "8-bit optimizer states"):
        assert f"\n{way}, no ZeRO" in out
    assert row(out, "LoRA, no ZeRO") == [max(row(one, "total")), 23.60]
    assert "over 1,024 GPUs, alone: 35.35 GB each, does not fit; more GPUs were not tried" in out
    assert "ZeRO 3 over 8 GPUs, with the rows above LoRA: 16.07 GB each, fits" in out
    assert run(capsys, *zero, "--checkpoint")[1].count("ZeRO 3 over") == 1
    assert "not for adafactor" in run(capsys, *zero[:3], "--optimizer", "adafactor", "--gpu", "24GB")[1]


def test_small_numbers_and_both_units(capsys):
    out = run(capsys, GPT2)[1]
    assert "\nMB at" in out and "buffer" not in out and row(out, "weight") == [248.88, 248.88]
    out = run(capsys, LLAMA, "--gpu", "24GiB")[1]
    assert "fits in 25.77 GB (24.00 GiB)" in out and "<0.01" in out and " 0.00" not in out
    assert "in 500.00 KB (488.28 KiB)" in run(capsys, GPT2, "--gpu", "500KB")[1]
