"""Generation: against loops written out, each prompt of a batch against itself alone, beam search against
exhaustive search and recorded results of Hugging Face transformers."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2np import reference, sampling
from gpt2np.beams import beam_search
from gpt2np.decoding import Stopper
from gpt2np.errors import ContextOverflowError, InputError, TokenizerError, TokenRangeError
from gpt2np.generate import generate
from gpt2np.model import GPT2
from gpt2np.tokenizer import encode, end_of_text_id
from tiny import random_ids, shapes_run, tiny_config, tiny_model, tiny_sources
from toy_tokenizer import train

ENGINES = ["numpy", pytest.param("numba", marks=pytest.mark.jit)]
TOY = train()
SAMPLED = {"temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module", params=ENGINES)
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def talker():
    """A model over the toy tokenizer's vocabulary."""
    config = tiny_config(vocab_size=TOY.get_vocab_size(), n_ctx=60)
    made = GPT2(config, tiny_sources(config), "numpy")
    made.tokenizer = TOY
    return made


def ids_of(steps, row=0):
    return [step.token_id for step in steps if step.row == row]


def greedy_loop(model, ids, n):
    """What greedy generation is, without a cache."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(model(ids).logits[0, -1].argmax()))
    return ids[-n:]


def test_greedy_is_the_default(model):
    prompt = random_ids(model.config, 5).tolist()
    steps = list(model.generate(prompt, 15))
    assert ids_of(steps) == greedy_loop(model, prompt, 15)
    assert [step.finish for step in steps] == [None] * 14 + ["length"]
    assert {step.text for step in steps} == {""}  # no tokenizer
    assert ids_of(generate(model, np.array(prompt, np.int32), 15)) == ids_of(steps)


def test_logprobs_are_the_models_own(model):
    prompt = random_ids(model.config, 4).tolist()
    for options in ({}, {"temperature": 2.0, "top_k": 9, "repetition_penalty": 1.5, "seed": 1}):
        steps = list(generate(model, prompt, 8, logprobs=3, **options))
        ids = prompt + ids_of(steps)
        for i, step in enumerate(steps):
            logits = model(ids[: len(prompt) + i]).logits[0, -1].astype(np.float64)
            expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            np.testing.assert_allclose(step.logprob, expected[step.token_id], atol=1e-5)
            assert [token for token, _ in step.top] == np.argsort(-expected)[:3].tolist()
            np.testing.assert_allclose([p for _, p in step.top], np.sort(expected)[::-1][:3], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 9},
        {"max_new_tokens": 9, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5, "logprobs": 2},
        {"max_new_tokens": None, "temperature": 1.0, "eos_token_id": [3, 8, 30], "seed": 11},
        {"max_new_tokens": 45, "window": True},
        {"max_new_tokens": 45, "window": 1, **SAMPLED},
        {"max_new_tokens": 45, "window": 20, "eos_token_id": 3, **SAMPLED},
    ],
)
def test_each_prompt_of_a_batch_gets_what_it_gets_alone(model, options):
    """Bit for bit: ids, log-probabilities and reasons to end."""
    longest = 30 if "window" in options else 11
    prompts = [random_ids(model.config, n, seed=n).tolist() for n in (3, 7, 1, longest, 7)]
    together = list(generate(model, prompts, **options))
    ends = set()
    for row, prompt in enumerate(prompts[:4]):
        alone = [(s.token_id, s.logprob, s.top, s.finish) for s in generate(model, prompt, **options)]
        assert [(s.token_id, s.logprob, s.top, s.finish) for s in together if s.row == row] == alone
        ends.add(len(alone))
    if options["max_new_tokens"] is None:
        assert len(ends) > 1  # rows ended at different times


def test_equal_prompts_in_a_batch_get_different_samples(model):
    prompt = random_ids(model.config, 5).tolist()
    steps = list(generate(model, [prompt, prompt], 10, **SAMPLED))
    assert ids_of(steps, 0) != ids_of(steps, 1)
    assert ids_of(steps, 0) == ids_of(generate(model, prompt, 10, **SAMPLED))


def test_a_seed_reproduces_and_no_seed_does_not(model):
    prompt = [1, 2, 3]
    runs = {tuple(ids_of(generate(model, prompt, 12, temperature=2.0, seed=s))) for s in (1, 1, 2, None, None)}
    assert len(runs) == 4


def test_sampling_is_the_loop_written_out(model):
    prompt = random_ids(model.config, 6).tolist()
    options = {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3}
    ids, rng = list(prompt), sampling.random_stream(9, prompt)
    cache = model.new_cache()
    fed = ids
    for _ in range(10):
        logits = model(fed, cache=cache).logits[0, -1]
        ids.append(sampling.Sampling(**options).choose(logits, np.unique(ids), rng))
        fed = ids[-1:]
    assert ids_of(generate(model, prompt, 10, seed=9, **options)) == ids[6:]


def test_an_end_token_ends(model):
    prompt = random_ids(model.config, 5).tolist()
    free = ids_of(generate(model, prompt, 12))
    end = free[4]
    steps = list(generate(model, prompt, 12, eos_token_id=end))
    assert ids_of(steps) == free[: free.index(end) + 1]
    assert steps[-1].finish == "eos"


def test_the_last_place_in_the_context_can_be_used(model):
    n_ctx = model.config.n_ctx
    prompt = random_ids(model.config, n_ctx).tolist()
    assert ids_of(generate(model, prompt, None)) == greedy_loop(model, prompt, 1)
    assert len(list(generate(model, prompt[:-4], None))) == 5
    assert len(list(generate(model, prompt[:-4], 5))) == 5


def test_too_much_is_an_error_before_any_work(model):
    n_ctx = model.config.n_ctx
    broken = tiny_model("numpy")
    broken._kernels = None  # any work would fail
    for prompt, new in ((n_ctx, 2), (n_ctx + 1, 1), (n_ctx + 1, None), (3, n_ctx)):
        with pytest.raises(ContextOverflowError, match=rf"{prompt} tokens.*n_ctx is {n_ctx}.*--window"):
            broken.generate([1] * prompt, new)


@pytest.mark.parametrize("kept", [1, 7, 20])
def test_a_sliding_window_is_a_fresh_start_with_the_last_tokens(model, kept):
    n_ctx = model.config.n_ctx
    for length in (5, n_ctx, n_ctx + 9):
        prompt = random_ids(model.config, length).tolist()
        ids = list(prompt)
        context = ids if length <= n_ctx else ids[-kept:]
        for _ in range(40):
            ids.append(int(model(context).logits[0, -1].argmax()))
            context = [*context, ids[-1]] if len(context) < n_ctx else ids[-kept:]
        assert ids_of(generate(model, prompt, 40, window=kept)) == ids[length:]
    if kept == n_ctx // 2:
        assert ids_of(generate(model, prompt, 40, window=True)) == ids[length:]


def test_without_a_limit_a_sliding_window_never_ends(model):
    steps = generate(model, [1, 2], None, window=True)
    assert len(list(itertools.islice(steps, 100))) == 100


def test_a_cache_saves_what_it_holds(model):
    prompt = random_ids(model.config, 6).tolist()
    cache = model.new_cache()
    first = ids_of(generate(model, prompt, 4, cache=cache))
    assert cache.length == 9
    talk = [*prompt, *first, 5, 6]
    with pytest.MonkeyPatch.context() as patch:
        computed = shapes_run(model, patch)
        second = ids_of(generate(model, talk, 4, cache=cache))
    assert computed == [(1, 3), (1, 1), (1, 1), (1, 1)]
    if model.engine == "numba":  # BLAS may differ in the last bit between a chunk and the whole
        assert second == ids_of(generate(model, talk, 4))


def test_a_cache_that_does_not_fit_is_an_error(model):
    cache = model.new_cache()
    cache.advance(3)
    for prompt, options in (
        ([1, 2, 3], {}),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], {}),
        ([1, 2, 3, 4], {"window": True}),
        ([1, 2, 3, 4], {"num_beams": 2}),
    ):
        with pytest.raises(InputError, match="cache"):
            generate(model, prompt, 2, cache=cache, **options)
    with pytest.raises(InputError, match="batch_size 1"):
        generate(model, [1], 2, cache=model.new_cache(2))
    with pytest.raises(ContextOverflowError):
        generate(model, [1, 2], 4, cache=model.new_cache(1, 4))
    with pytest.raises(InputError, match="1 layers.*needed"):
        generate(model, [1, 2], 4, cache=tiny_model(n_layer=1).new_cache())


# ---------------------------------------------------------------------------------------------- text


def test_text_in_text_out(talker):
    prompt = "Once upon a time"
    steps = list(generate(talker, prompt, 20, seed=1, temperature=1.0))
    text = "".join(step.text for step in steps)
    assert text == TOY.decode(ids_of(steps), skip_special_tokens=False)
    assert ids_of(generate(talker, encode(TOY, prompt), 20, seed=1, temperature=1.0)) == ids_of(steps)
    assert {s.row for s in generate(talker, [prompt, "The king"], 5)} == {0, 1}


def test_the_end_token_is_not_text(talker):
    end = end_of_text_id(TOY)
    talker_ends = Speaker(talker, [*encode(TOY, "a é")[:-1], end])
    steps = list(generate(talker_ends, "x", 20, eos_token_id=end))
    assert steps[-1].finish == "eos"
    assert "".join(s.text for s in steps) == "a �"  # an unfinished character comes out at the end


class Speaker:
    """A language model that answers any prompt with exactly these tokens."""

    def __init__(self, talker, wanted):
        self.config, self.tokenizer, self.script = talker.config, talker.tokenizer, iter(wanted)

    def decoder(self, rows, window=None, cache=None, lookup=False):
        return self

    log_probabilities = staticmethod(reference.log_probabilities)

    def prefill(self, texts):
        scores = np.zeros(self.config.vocab_size, np.float32)
        scores[next(self.script)] = 9
        return [scores]

    def feed(self, rows, texts):
        return self.prefill(texts)


@pytest.mark.parametrize(
    ("spoken", "stop", "expected"),
    [
        ("One day. The king.", ".", "One day"),
        ("One day. The king.", ["king", "day."], "One "),
        ("aab aab", "ab", "a"),
        ("abcabd", "abd", "abc"),  # what looked like the beginning of it is shown after all
        ("déjà vu", "à", "déj"),  # a stop string of two bytes, which are two tokens
        ("no end here", "zzz", "no end here"),
    ],
)
def test_stop_strings_across_tokens(talker, spoken, stop, expected):
    ids = encode(TOY, spoken)
    steps = list(generate(Speaker(talker, ids), "x", len(ids), stop=stop))
    assert "".join(s.text for s in steps) == expected
    assert steps[-1].finish == ("length" if expected == spoken else "stop")
    shown = list(itertools.accumulate(s.text for s in steps))
    assert all(expected.startswith(text) for text in shown)


pieces = st.lists(st.text("ab.", max_size=4), max_size=12)


@given(pieces, st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_cut_into_pieces_does_not_matter(parts, stops):
    def run(parts):
        stopper, shown = Stopper(stops), ""
        for part in parts:
            text, stopped = stopper.push(part)
            shown += text
            if stopped:
                return shown, True
        return shown + stopper.flush(), False

    whole = "".join(parts)
    shown, stopped = run(parts)
    assert (shown, stopped) == run(list(whole))  # character by character
    assert stopped == any(s in whole for s in stops)
    assert whole.startswith(shown)
    assert not any(s in shown for s in stops)
    if not stopped:
        assert shown == whole


def test_a_tokenizer_of_another_model_is_an_error():
    model = tiny_model("numpy")  # 37 tokens
    with pytest.raises(TokenRangeError, match=r"0\.\.36: it is not this model's tokenizer"):
        generate(model, "Once upon a time", 3, tokenizer=TOY)


def test_a_prompt_at_fault_is_named(model):
    with pytest.raises(InputError, match="prompt 2 of 3 is empty"):
        generate(model, [[1], [], [2]])
    with pytest.raises(TokenRangeError, match="token id 99 in prompt 3 of 3"):
        generate(model, [[1], [1], [99]])


def test_stop_and_text_need_a_tokenizer(model):
    with pytest.raises(TokenizerError, match="--tokenizer"):
        generate(model, [1, 2], 3, stop="x")
    with pytest.raises(TokenizerError, match="--tokenizer"):
        generate(model, "text", 3)


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ([], {}, InputError),
        ([[1], []], {}, InputError),
        (5, {}, InputError),
        ([1.5, 2.0], {}, InputError),
        ([[[1, 2]]], {}, InputError),
        ([[[1], [1, 2]]], {}, InputError),
        ([1, 37], {}, TokenRangeError),
        ([[1], [-1]], {}, TokenRangeError),
        ([1], {"max_new_tokens": 0}, InputError),
        ([1], {"num_beams": 0}, InputError),
        ([1], {"logprobs": -1}, InputError),
        ([1], {"seed": -1}, InputError),
        ([1], {"stop": ["a", ""]}, InputError),
        ([1], {"window": 0}, InputError),
        ([1], {"window": 21}, InputError),
        ([1], {"eos_token_id": 37}, TokenRangeError),
        ([1], {"top_k": -1}, InputError),
        ([1], {"num_beams": 2, "temperature": 1.0}, InputError),
        ([1], {"num_beams": 2, "window": True}, InputError),
        ([1], {"num_beams": 2, "logprobs": 2}, InputError),
        ([1], {"length_penalty": float("nan")}, InputError),
        ([1], {"num_beams": 2, "length_penalty": float("inf")}, InputError),
        ([1], {"num_beams": 2, "length_penalty": 1e4}, InputError),
        ([1], {"num_beams": 2, "length_penalty": -1e4}, InputError),
    ],
)
def test_bad_arguments_are_errors_at_the_call(prompt, options, error):
    broken = tiny_model("numpy")
    broken._kernels = None  # any work would fail
    with pytest.raises(error):
        generate(broken, prompt, **{"max_new_tokens": 3, **options})


# ---------------------------------------------------------------------------------------- beam search


@pytest.mark.parametrize("case", json.loads((Path(__file__).parent / "beam_search_cases.json").read_text()))
def test_beam_search_agrees_with_transformers(case):
    """Recorded with transformers 4.57.6, GPT2LMHeadModel.generate(do_sample=False), on this very tiny model."""
    found = beam_search(
        tiny_model("numpy"),
        case["prompt"],
        9,
        case["num_beams"],
        case["length_penalty"],
        case["eos"],
        case["repetition_penalty"],
    )
    assert [list(beam.ids) for beam in found] == [ids for ids, _ in case["beams"]]
    np.testing.assert_allclose([beam.score for beam in found], [score for _, score in case["beams"]], rtol=1e-5)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_a_wide_beam_search_is_exhaustive(length_penalty):
    model = tiny_model("numpy", dtype="float64", vocab_size=5)
    prompt, end, n = [1, 4], 2, 4
    found = beam_search(model, prompt, n, 5**n, length_penalty, end)

    def all_hypotheses(ids, logprob):
        logits = model([*prompt, *ids]).logits[0, -1]
        for token in range(5):
            total = logprob + model.log_probabilities(logits, np.array([token]))[0][0]
            longer = (*ids, token)
            if token == end or len(longer) == n:
                yield longer, total / len(longer) ** length_penalty
            else:
                yield from all_hypotheses(longer, total)

    expected = sorted(all_hypotheses((), 0.0), key=lambda pair: -pair[1])
    assert [beam.ids for beam in found] == [ids for ids, _ in expected]
    np.testing.assert_allclose([beam.score for beam in found], [score for _, score in expected], rtol=1e-12)


@pytest.mark.parametrize("penalty", [0, -1, math.nan, "2", [2.0]])
def test_beam_search_refuses_a_penalty_as_generate_does(model, penalty):
    with pytest.raises(InputError, match="repetition_penalty must be"):
        beam_search(model, [1, 2], 3, repetition_penalty=penalty)


def test_one_beam_is_greedy_and_more_are_no_worse(model):
    prompt = random_ids(model.config, 5).tolist()
    (greedy,) = beam_search(model, prompt, 10, num_beams=1)
    assert list(greedy.ids) == greedy_loop(model, prompt, 10)
    assert greedy.finish == "length"


def test_generate_yields_the_best_beam(model):
    prompts = [random_ids(model.config, n, seed=n).tolist() for n in (5, 2)]
    steps = list(generate(model, prompts, 8, num_beams=3, eos_token_id=7))
    for row, prompt in enumerate(prompts):
        best = beam_search(model, prompt, 8, 3, eos_token_id=7)[0]
        mine = [s for s in steps if s.row == row]
        assert tuple(s.token_id for s in mine) == best.ids
        assert tuple(s.logprob for s in mine) == best.logprobs
        assert [s.finish for s in mine] == [None] * (len(mine) - 1) + [best.finish]


def test_beam_text(talker):
    steps = list(generate(talker, "Once", 9, num_beams=3))
    assert "".join(s.text for s in steps) == TOY.decode(ids_of(steps), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("eos_token_id", "x", "eos_token_id must be a whole number"),
        ("temperature", "x", "temperature must be a number"),
        ("temperature", math.nan, "temperature must be a number"),
        ("temperature", 10**400, "temperature must be a number"),
        ("num_beams", 2.5, "num_beams must be a whole number"),
        ("top_k", 1.5, "top_k must be a whole number"),
        ("top_p", "x", "top_p must be a number"),
        ("seed", "a", "seed must be a whole number"),
        ("max_new_tokens", 2.5, "max_new_tokens must be a whole number"),
        ("logprobs", None, "logprobs must be a whole number"),
        ("window", "a", "window must be a whole number"),
        ("stop", 5, "stop must be a string or a sequence of strings"),
    ],
)
def test_options_of_a_wrong_type_are_named(talker, option, value, message):
    with pytest.raises(InputError, match=message):
        generate(talker, [1, 2], **{option: value})
