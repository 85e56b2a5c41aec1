"""The borders of GPT-2's parts, found from the outputs backwards: which nodes are an attention, which an MLP."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

from ...errors import UnsupportedModelError
from ..graph import VIEWS, Graph, Node
from ..normalise.fold import scalar, small
from .linear import LINEAR_PATTERNS, LinearFound, match_linear, nearest_linears, vector
from .lookup import Lookup, match_lookup
from .norm import LayerNormFound, match_layer_norm
from .products import AttentionCore, match_attention, match_product

Roles = dict[str, tuple[str, int | None]]  # of inputs or outputs: a role, and the layer


def match_last_position(graph: Graph, name: str) -> str | None:
    """What a value is the last position of, (B, T, C) -> (B, 1, C) or (B, C)."""
    node = graph.producers.get(name)
    if node is None:
        return None
    if node.op == "Transpose" and (time_first := _time_first(node)) is not None:  # x[:, [-1], :] in PyTorch
        picked = graph.producers.get(time_first)
        index = small(graph, picked.inputs[1]) if picked is not None and picked.op == "GatherND" else None
        if picked is None or index is None or index.size != 1 or int(index.flat[0]) != -1:
            return None
        whole = graph.producers.get(picked.inputs[0])
        return _time_first(whole) if whole is not None and not picked.attributes.get("batch_dims") else None
    if node.op == "Gather" and node.attributes.get("axis", 0) in (1, -2):
        index = small(graph, node.inputs[1])
        return node.inputs[0] if index is not None and index.size == 1 and int(index.flat[0]) == -1 else None
    if node.op == "Slice" and len(node.inputs) > 3:
        bounds = [small(graph, node.inputs[i]) for i in (1, 2, 3)]
        start, end, axis = (int(b.flat[0]) if b is not None and b.size == 1 else 0 for b in bounds)
        if start == -1 and end >= 2**31 - 1 and axis in (1, -2):
            return node.inputs[0]
    return None


def _time_first(node: Node) -> str | None:
    """What a node exchanges the first two of three axes of."""
    return node.inputs[0] if node.op == "Transpose" and node.attributes.get("perm") == [1, 0, 2] else None


@dataclass(frozen=True)
class Addend:
    """One term of the residual stream."""

    value: str  # behind all views
    seen: str  # as it is added, with batch and time axes


def addends(graph: Graph, name: str) -> list[Addend]:
    """The terms that a value is the sum of, whatever the order of the additions.

    A term that is added twice is there twice; raises where that makes more terms than the graph has nodes, as it does
    where sums are doubled again and again.
    """
    found: list[Addend] = []
    pending = [(name, name)]
    while pending:
        current, seen = pending.pop()
        node = graph.producers.get(current)
        if len(found) + len(pending) > len(graph.nodes) + 2:
            raise UnsupportedModelError(f"{seen!r} adds up the same values again and again: no GPT-2 does")
        if node is None:
            found.append(Addend(current, seen))
        elif node.op in VIEWS:
            pending.append((node.inputs[0], seen))
        elif node.op in ("Add", "Sum") and match_linear(graph, current) is None:
            pending += [(i, i) for i in reversed(node.inputs) if i not in graph.fixed or scalar(graph, i) != 0]
        else:
            found.append(Addend(current, seen))
    return found


@dataclass
class Branch:
    """One term of the residual stream: an attention or an MLP."""

    addend: Addend
    out: LinearFound  # c_proj
    norm: LayerNormFound
    before: list[Addend]  # the residual stream that it reads
    core: AttentionCore | None = None  # of an attention
    maps: tuple[LinearFound, ...] = ()  # c_attn (or three maps), or c_fc

    @cached_property
    def borders(self) -> list[str]:
        """The values at its borders."""
        core = [self.core.scores.out, self.core.heads.out] if self.core else []
        return [self.norm.x, self.norm.out, *(m.out for m in self.maps), *core, self.out.out]


@dataclass
class Borders:
    """Where the parts of a GPT-2 begin and end in a graph."""

    head: LinearFound | None
    final: LayerNormFound  # ln_f
    output_roles: Roles
    words: Lookup  # wte
    places: Lookup  # wpe
    types: Lookup | None  # wte once more, by token types
    layers: list[tuple[Branch, Branch]]  # an attention and an MLP each

    @cached_property
    def width(self) -> int:
        """The widest of all maps' outputs."""
        return max(m.weight.shape[-1] for layer in self.layers for branch in layer for m in (*branch.maps, branch.out))

    @property
    def lookups(self) -> list[Lookup]:
        """All embeddings."""
        return [lookup for lookup in (self.words, self.places, self.types) if lookup is not None]

    @property
    def streams(self) -> list[str]:
        """The residual stream before each layer, and behind the last one."""
        return [*(attention.norm.x for attention, _ in self.layers), self.final.x]

    @property
    def cores(self) -> list[AttentionCore]:
        """The attention of each layer."""
        return [attention.core for attention, _ in self.layers if attention.core is not None]


def find_borders(graph: Graph) -> Borders:
    """Find the parts, from the outputs backwards."""
    head, final, output_roles = find_top(graph)
    lookups, branches = find_branches(graph, final)
    layers = pair(graph, lookups, branches, final)
    return Borders(head, final, output_roles, *tell_lookups(graph, lookups), layers)


def find_top(graph: Graph) -> tuple[LinearFound | None, LayerNormFound, Roles]:
    """The head (if there is one), the last layer norm, and the outputs' roles."""
    roles: Roles = {}
    head: LinearFound | None = None
    final: LayerNormFound | None = None
    for output in graph.outputs:
        value = graph.strip(output.name)
        norm, linear = match_layer_norm(graph, value), None
        role = "last_hidden_state"
        if norm is None and (linear := match_linear(graph, value)) is not None:
            read = graph.strip(linear.x)
            role = "logits"
            if (all_positions := match_last_position(graph, read)) is not None:
                read, role = graph.strip(all_positions), "last_logits"
            norm = match_layer_norm(graph, read)
        if norm is None:
            continue
        if final is not None and final.out != norm.out:
            longer = len(addends(graph, norm.x)) > len(addends(graph, final.x))
            final = norm if longer else final
        final = final or norm
        head = linear or head
        roles[output.name] = role, None
    if final is None:
        for output in graph.outputs:
            _refuse_classifier(graph, output.name)
        names = ", ".join(o.name for o in graph.outputs)
        raise UnsupportedModelError(
            f"none of the outputs {names} is a layer norm, or a linear map behind one, at all positions or the last: "
            "no GPT-2 ends like this"
        )
    return head, final, roles


def _refuse_classifier(graph: Graph, output: str) -> None:
    """Raise if an output is chosen from a linear map behind a layer norm: a class for each sequence, or a span."""
    for value in graph.ancestors(output, limit=200):
        linear = match_linear(graph, value)
        if linear is not None and match_layer_norm(graph, graph.strip(linear.x)) is not None:
            width = linear.weight.shape[1]
            raise UnsupportedModelError(
                f"output {output!r} is chosen from {linear.node.describe()}, which gives {width} numbers for each "
                f"position: the head of a classifier with {width} classes, not one with a number for each token"
            )
        if linear is not None or match_layer_norm(graph, value) is not None:
            return


def find_branches(graph: Graph, final: LayerNormFound) -> tuple[list[Lookup], list[Branch]]:
    """The terms of the residual stream: embeddings, attentions and MLPs."""
    lookups: list[Lookup] = []
    branches: list[Branch] = []
    for addend in addends(graph, final.x):
        if (lookup := match_lookup(graph, addend.value)) is not None:
            lookups.append(lookup)
        elif addend.value in graph.fixed:
            continue  # zero, or a bias that a fused node adds to the stream; `pair` finds out whose
        elif (linear := match_linear(graph, addend.value)) is not None:
            branches.append(find_branch(graph, addend, linear))
        else:
            node = graph.producers.get(addend.value)
            where = node.describe() if node else f"the value {addend.value!r}"
            raise UnsupportedModelError(f"{where} adds to the residual stream, but is no embedding, attention or MLP")
    return lookups, branches


def find_branch(graph: Graph, addend: Addend, out: LinearFound) -> Branch:
    """Is this map the end of an attention or of an MLP?"""
    core: AttentionCore | None = None
    maps: list[LinearFound] = []
    for value in graph.ancestors(out.x, ops=LINEAR_PATTERNS):
        if (linear := match_linear(graph, value)) is not None:
            maps = [linear]
            break
        if match_product(graph, value) is not None:
            core = match_attention(graph, out.x)
            break
    if core is not None:
        found = [nearest_linears(graph, v)[0] for v in (core.scores.a, core.scores.b, core.heads.b)]
        maps = list({m.out: m for part in found for m in part}.values())
    if not maps:
        raise UnsupportedModelError(
            f"{out.node.describe()} adds to the residual stream, but what it reads is no attention and no MLP"
        )
    norms = {graph.strip(m.x): match_layer_norm(graph, graph.strip(m.x)) for m in maps}
    norm = next(iter(norms.values()))
    if len(norms) != 1 or norm is None:
        raise UnsupportedModelError(f"{maps[0].node.describe()} does not read a layer norm")
    return Branch(addend, out, norm, addends(graph, norm.x), core, tuple(maps))


def pair(
    graph: Graph, lookups: list[Lookup], branches: list[Branch], final: LayerNormFound
) -> list[tuple[Branch, Branch]]:
    """Order the branches: each must read the embeddings and all branches before it, in turns."""
    branches = sorted(branches, key=lambda b: len(b.before))
    terms = Counter(lookup.out for lookup in lookups)
    biases: Counter[str] = Counter()
    for n, branch in enumerate(branches):
        if Counter(a.value for a in branch.before) != terms + biases:
            if n and Counter(a.value for a in branch.before) == Counter(a.value for a in branches[n - 1].before):
                raise UnsupportedModelError(
                    f"{branch.norm.node.describe()} (layer norm {n + 1}): an attention and an MLP read the same stream "
                    "side by side (parallel blocks, as in GPT-J): GPT-2's MLP reads what the attention has added to"
                )
            raise UnsupportedModelError(
                f"{branch.norm.node.describe()} (layer norm {n + 1}) does not read the residual stream: "
                "the embeddings plus every attention and MLP before it"
            )
        if (branch.core is None) != bool(n % 2):
            kind = "an MLP" if branch.core is None else "an attention"
            raise UnsupportedModelError(f"{branch.out.node.describe()} ends {kind} where the other is due")
        terms[branch.addend.value] += 1
        after = branches[n + 1].before if n + 1 < len(branches) else addends(graph, final.x)
        added = Counter(a.value for a in after if a.value in graph.fixed) - biases - terms
        biases += added
        for name in added:
            bias = vector(graph, name, branch.out.weight.shape[1])
            if bias is None:
                raise UnsupportedModelError(
                    f"{branch.out.node.describe()}: {name!r} is added behind it, but is no bias"
                )
            bias = bias if branch.out.bias is None else branch.out.bias.plus(bias)
            branch.out = replace(branch.out, bias=bias, bias_later=name)
    if len(branches) % 2 or not branches:
        raise UnsupportedModelError(f"{len(branches)} attentions and MLPs do not make whole blocks")
    return list(zip(branches[::2], branches[1::2], strict=True))


def tell_lookups(graph: Graph, lookups: list[Lookup]) -> tuple[Lookup, Lookup, Lookup | None]:
    """Which table is wte, which is wpe, and whether wte is looked up once more, by token types."""
    tables = ", ".join(lookup.table.describe() for lookup in lookups) or "none"
    rotates = next((node for node in graph.nodes if node.op in ("Cos", "Sin")), None)
    if len(lookups) == 1 and rotates is not None:
        raise UnsupportedModelError(
            f"positions are turned into angles ({rotates.describe()}), and no table holds them (rotary positions): "
            "GPT-2 adds wpe instead"
        )
    if len(lookups) not in (2, 3):
        raise UnsupportedModelError(f"GPT-2 starts with two embeddings, tokens and positions; here are: {tables}")
    order = [port.name for port in graph.inputs]

    def likely_words(lookup: Lookup) -> tuple[bool, bool, bool, bool, int, int]:
        source = graph.strip(lookup.rows) if lookup.rows else ""
        name = " ".join(lookup.table.origin)
        return (
            "wte" in name and "wpe" not in name,
            source in graph.input_names,
            "position" not in source,
            "type" not in source,
            lookup.table.shape[0],
            -order.index(source) if source in order else 0,
        )

    words, *others = sorted(lookups, key=likely_words, reverse=True)
    if len(inputs_behind(graph, words)) != 1:
        raise UnsupportedModelError(f"{words.node.describe()} does not look up the ids of an input")
    types = next((o for o in others if o.table.is_same(words.table)), None)
    if (types is None) != (len(others) == 1) or (types and graph.strip(types.rows) not in graph.input_names):
        raise UnsupportedModelError(
            f"GPT-2 starts with two embeddings, tokens and positions (and may look up token types in that of "
            f"the tokens); here are: {tables}"
        )
    return words, next(o for o in others if o is not types), types


def inputs_behind(graph: Graph, lookup: Lookup) -> list[str]:
    """The inputs whose values choose the rows."""
    return [v for v in graph.ancestors(lookup.rows) if v in graph.input_names] if lookup.rows else []
