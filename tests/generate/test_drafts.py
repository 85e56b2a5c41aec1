"""Drafts: the same steps as without, in fewer passes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpt2np
from gpt2np.drafts import FURTHER, Costs, Drafter, DraftingCache, Phrases
from gpt2np.errors import InputError
from gpt2np.generate import generate
from gpt2np.kernels import ROWS
from gpt2np.model import GPT2
from tiny import ArraySource, random_ids, shapes_run, tiny_config, tiny_model, tiny_sources

STORY = "Once upon a time, there was a little girl named Lily. Once upon a time"


@pytest.fixture(scope="module")
def mini():
    return gpt2np.load()


@pytest.fixture
def set_cost(monkeypatch):
    """Let a further position cost so much, instead of what is measured."""
    return lambda more: monkeypatch.setattr(Costs, "of", lambda costs, further: 1 + more * further)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_the_longest_match_counts_and_of_those_the_last(text):
    for length in (3, 2, 1):
        ends = [i for i in range(length, len(text)) if text[i - length : i] == text[-length:]]
        if ends:
            expected = ends[-1], length
            break
    else:
        expected = 0, 0
    assert Phrases().after(text) == expected
    grown = Phrases()  # the same for one that has seen the text grow
    for end in range(1, len(text)):
        grown.after(text[:end])
    assert grown.after(text) == expected


@pytest.mark.jit
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "seed": 1, "logprobs": 3},
        {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 2, "stop": [" dog"]},
        {"window": True, "max_new_tokens": 280},
        {"window": 40, "max_new_tokens": 280, "temperature": 0.5, "seed": 3},
        {"max_new_tokens": None},
    ],
)
def test_the_steps_are_those_without_drafts(mini, options):
    """Bit for bit: tokens, text, log-probabilities and reasons to end."""
    options = {"max_new_tokens": 60, "eos_token_id": 0, **options}
    assert list(mini.generate(STORY, lookup=True, **options)) == list(mini.generate(STORY, **options))


@pytest.mark.jit
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_model_any_text(dtype):
    model = tiny_model("numba", dtype=dtype)
    for seed, options in enumerate(({}, {"temperature": 3.0}, {"temperature": 0.1})):
        prompt = random_ids(model.config, 6, seed=seed).tolist() * 2
        expected = list(generate(model, prompt, None, seed=seed, **options))
        assert list(generate(model, prompt, None, seed=seed, lookup=True, **options)) == expected


@pytest.mark.jit
def test_several_prompts_run_as_without(mini):
    prompts = [STORY, "The king"]
    assert list(mini.generate(prompts, 20, lookup=True)) == list(mini.generate(prompts, 20))


@pytest.mark.jit
def test_text_that_repeats_takes_few_passes(mini, monkeypatch, set_cost):
    passes = shapes_run(mini, monkeypatch)
    set_cost(0.1)
    list(mini.generate("The dog ran. " * 30, 120, lookup=True))
    assert len(passes) < 1 + 120 / 2
    assert max(T for _, T in passes[1:]) == ROWS


@pytest.mark.jit
@pytest.mark.parametrize("temperature", [0.8, 100.0])
@pytest.mark.parametrize("more", [0.1, 0.3, 0.5, 1.0])
def test_drafts_never_cost_much(mini, monkeypatch, set_cost, temperature, more):
    """A hot text is as good as uniform, so no guess is right; where positions cost much, few guesses are worth it."""
    set_cost(more)
    passes = shapes_run(mini, monkeypatch)
    list(mini.generate(STORY, 200, temperature=temperature, seed=0, lookup=True))
    assert sum(1 + more * (T - 1) for _, T in passes[1:]) < 1.03 * 200


@pytest.mark.parametrize("more", [0.0, 0.3, 0.6, 1.0])
def test_a_draft_is_as_long_as_its_time_is_worth(set_cost, more):
    set_cost(more)
    text, drafter, made = [1, 2, 3, 4] * 30, Drafter((1, 3, 5)), []
    for end in range(1, len(text) - 5):
        tokens = drafter.draft(text[:end], 5)
        assert tokens == text[end : end + len(tokens)]
        for _ in tokens:
            drafter.was_right()
        made.append(len(tokens))
    assert sum(made[:4]) == 0
    assert made[-1] == (0 if more == 1 else 5)
    assert set(made) <= {0, 1, 3, 5}


def test_a_text_that_repeats_no_more_costs_few_passes(set_cost):
    """As in the text so far, phrases are followed by what followed them; only where a draft is run it is wrong."""
    set_cost(0.3)
    text, drafter, cost = [1, 2, 3, 4] * 10, Drafter((1, 3, 5)), 0.0
    for _ in range(400):
        wrong = drafter.draft(text, 5)
        cost += 0.3 * len(wrong)
        text.append(9 if wrong else text[-4])
    assert 0 < cost < 3 + 0.01 * 400


def test_costs_are_those_of_the_passes_so_far():
    costs = Costs()
    assert costs.of(5) == 1 + 5 * FURTHER
    for further, seconds in [(5, 80.0), (0, 40.0)]:  # the first ones prepare memory
        costs.took(further, seconds)
    assert costs.of(5) == 1 + 5 * FURTHER
    for _ in range(60):
        costs.took(0, 2.0)
        costs.took(5, 6.0)
    assert costs.of(5) == pytest.approx(3)
    costs.took(5, 1e9)  # it was held up
    assert 3 < costs.of(5) < 4
    assert costs.of(3) == 1 + 3 * FURTHER  # nothing is known of other lengths
    assert costs.of(0) == 1


@pytest.mark.jit
def test_the_times_of_all_passes_are_counted(mini, monkeypatch):
    counted = []
    monkeypatch.setattr(Costs, "took", lambda costs, further, seconds: counted.append((further, seconds > 0)))
    passes = shapes_run(mini, monkeypatch)
    list(mini.generate("The dog ran. " * 30, 60, lookup=True))
    assert counted == [(T - 1, True) for _, T in passes[1:]]
    assert any(further for further, _ in counted)


@pytest.mark.jit
def test_the_cache_holds_what_it_holds_without(mini):
    ids = mini.encode(STORY)
    plain, drafted = mini.new_cache(), mini.new_cache()
    steps = zip(mini.generate(ids, 40, cache=plain), mini.generate(ids, 40, cache=drafted, lookup=True), strict=True)
    for one, other in steps:
        assert one == other
        assert plain.length == drafted.length
        for ours, theirs in zip(plain.views(), drafted.views(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.jit
def test_scores_near_the_mask_are_not_drafted():
    """There the textbook computes, whose last bits depend on how many positions are run at once."""
    sources = tiny_sources(tiny_config())
    for name in sources:
        if "c_attn" in name:  # the scores are larger by the square of this
            sources[name] = ArraySource((sources[name].array * np.float32(1e4)).astype(np.float32))
    model = GPT2(tiny_config(), sources)
    cache = model.new_cache()
    assert model.logits_of_each([3, 1, 4], cache) is None
    assert cache.length == 0
    prompt = [3, 1, 4, 1, 5, 3, 1]
    assert list(generate(model, prompt, 12, lookup=True)) == list(generate(model, prompt, 12))


def test_what_cannot_be_drafted_is_refused():
    model = tiny_model("numpy")
    with pytest.raises(InputError, match="lookup needs engine"):
        generate(model, [1, 2], 4, lookup=True)
    with pytest.raises(InputError, match="lookup cannot be combined with num_beams"):
        generate(model, [1, 2], 4, lookup=True, num_beams=2)
    with pytest.raises(InputError, match="lookup must be True or False, got 3"):
        generate(model, [1, 2], 4, lookup=3)


@pytest.mark.jit
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.95}])
def test_lossless_over_many_tokens(mini, options):
    """7,000 steps of five texts each, over 100,000 in all, in texts that slide through the context.

    Without drafts the texts run together, which gives the same steps in fewer passes.
    """
    options = {"max_new_tokens": 7000, "window": True, "seed": 7, "logprobs": 1, **options}
    prompts = [
        STORY,
        "The king",
        "The dog ran. " * 30,
        "Tom and Sue went to the park. They",
        "One, two, three, one, two,",
    ]
    expected = [[] for _ in prompts]
    for step in mini.generate(prompts, **options):
        expected[step.row].append(step._replace(row=0))
    decoders = []

    class Watched:
        config, tokenizer, log_probabilities = mini.config, mini.tokenizer, mini.log_probabilities

        def decoder(self, *arguments):
            decoders.append(mini.decoder(*arguments))
            return decoders[-1]

    for prompt, steps in zip(prompts, expected, strict=True):
        assert list(generate(Watched(), prompt, lookup=True, **options)) == steps
    assert len(decoders) == len(prompts)
    assert all(isinstance(decoder, DraftingCache) for decoder in decoders)
