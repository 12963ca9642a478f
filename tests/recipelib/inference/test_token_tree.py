"""Plans hold every prompt once and within the budget; a tree sees what a path is."""

from itertools import takewhile

import torch
from hypothesis import given
from hypothesis import strategies as st

from recipelib.inference.token_tree import Tree, common_length, plan_passes

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=14)
prompt_lists = st.lists(tokens, max_size=12)


@given(tokens, tokens)
def test_the_common_length_is_that_of_the_common_prefix(one, other):
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    assert common_length(one, other) == len(list(pairs))


@given(
    st.lists(st.tuples(tokens, st.integers(0, 5)), max_size=12),
    st.integers(1, 40),
    st.integers(0, 120),
)
def test_a_plan_holds_every_prompt_once_behind_what_they_all_begin_with(rows, budget, common):
    prompts = [[9] * common + row for row, _ in rows]
    extra = [more for _, more in rows]
    passes = plan_passes(prompts, extra, budget)
    assert sorted(one for some in passes for one in some.members) == list(range(len(prompts)))
    for one in passes:
        members = [prompts[member] for member in one.members]
        kept = members[0][: one.kept]
        assert all(member[: one.kept] == kept for member in members)
        assert all(len(member) > one.kept for member in members)
        # What it says that it computes is what a tree holds, with all that follows the prompts.
        tree = Tree()
        for member in members:
            tree.add(member[one.kept :])
        assert one.tokens == len(tree.ids) + sum(extra[member] for member in one.members)
        assert one.tokens <= budget or len(one.members) == 1


def test_a_long_beginning_is_kept_where_several_passes_need_it_and_a_short_one_is_not():
    def plan(common: int, budget: int = 50):
        rows = [[1] * common + [5 + number] * 10 for number in range(20)]
        return plan_passes(rows, [0] * 20, budget)

    assert {one.kept for one in plan(300)} == {300}
    assert {one.kept for one in plan(10, budget=100)} == {0}
    assert [one.kept for one in plan(300, budget=10**6)] == [0]
    # Once and 200 tokens, rather than 20 times 310.
    assert sum(one.tokens for one in plan(300)) == 200


def test_draws_of_demonstrations_are_kept_one_after_the_other_below_what_they_share():
    draws = [[1] * 100 + [10 + draw] * 200 for draw in range(3)]
    rows = [draw + [50 + number] * 20 for number in range(10) for draw in draws]
    passes = plan_passes(rows, [0] * 30, 100)
    assert {one.kept for one in passes} == {300}
    order = [rows[one.members[0]][100] for one in passes]
    assert order == sorted(order)
    assert len(passes) == 6


def test_prompts_that_begin_one_another_are_all_planned_however_many_they_are():
    rows = [[1] * length for length in range(1, 3001)]
    passes = plan_passes(rows, [1] * 3000, 100)
    assert sum(len(one.members) for one in passes) == 3000


@given(prompt_lists, st.integers(0, 5))
def test_each_token_of_a_tree_sees_the_kept_ones_its_own_path_and_itself(rows, kept):
    tree = Tree()
    paths = [tree.add(row) for row in rows]
    assert len(tree.ids) == len(
        {tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)}
    )
    sees = tree.visible(kept)
    assert sees.shape == (len(tree.ids), kept + len(tree.ids))
    for row, path in zip(rows, paths, strict=True):
        assert [tree.ids[place] for place in path] == row
        assert [tree.depths[place] for place in path] == list(range(len(row)))
        for length, place in enumerate(path, 1):
            expected = torch.zeros(kept + len(tree.ids), dtype=torch.bool)
            expected[:kept] = True
            expected[[kept + one for one in path[:length]]] = True
            assert torch.equal(sees[place], expected)


def test_a_branch_grows_behind_the_place_it_is_given():
    tree = Tree()
    first = tree.add([1, 2, 3])
    assert tree.add([4], first[1]) == [3]
    assert tree.add([3, 4], first[1]) == [2, 4]
    assert tree.parents == [-1, 0, 1, 1, 2]
