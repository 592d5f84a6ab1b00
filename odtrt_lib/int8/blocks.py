"""Which convolutions of a detector are its backbone, its neck and its heads, from the graph alone.

No names of nodes are read. What decides is from where and to where a path leads:

* **heads**: the convolutions that lead to one output of the network only, the boxes or the classes. A tower
  that both share leads to two, and is none.
* **neck**: begins where feature maps of several scales are joined. A join is a node with two or more computed
  inputs, one of which was enlarged by a Resize, with no convolution since. To the neck belong the
  convolutions whose output comes to a join with no other convolution in between (the lateral ones), and all
  behind these or behind a join, except for the heads.
* **backbone**: the rest. A network that joins no scales, such as an SSD without a feature pyramid, has no
  neck; its extra layers count as backbone.

The additions of residual blocks and the gates of squeeze-and-excitation are no joins: nothing is enlarged by
a Resize there. If a pyramid takes a map of the backbone without a lateral convolution, the last convolution
of that map counts as neck.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, List, Set

if TYPE_CHECKING:
    import onnx

BACKBONE, NECK, HEADS = "backbone", "neck", "heads"


def blocks(model: onnx.ModelProto) -> Dict[str, str]:
    """Name of each convolution, in the order of the network -> ``backbone``, ``neck`` or ``heads``.

    model: ``heads.onnx`` in float32, with its nodes sorted, as ONNX demands.
    """
    nodes = model.graph.node
    producer = {output: number for number, node in enumerate(nodes) for output in node.output}
    before = [sorted({producer[name] for name in node.input if name in producer}) for node in nodes]
    convs = {number for number, node in enumerate(nodes) if node.op_type == "Conv"}
    joins = _joins(model, before)
    in_neck = joins | {one for join in joins for one in _convs_in_front(join, before, convs)}
    for number, sources in enumerate(before):
        if not in_neck.isdisjoint(sources):
            in_neck.add(number)
    leads_to: List[Set[str]] = [
        {output.name for output in model.graph.output if output.name in node.output} for node in nodes
    ]
    for number in reversed(range(len(nodes))):
        for source in before[number]:
            leads_to[source] |= leads_to[number]
    return {
        nodes[number].name: HEADS if len(leads_to[number]) == 1 else NECK if number in in_neck else BACKBONE
        for number in sorted(convs)
    }


def _joins(model: onnx.ModelProto, before: List[List[int]]) -> Set[int]:
    """The nodes that join scales, by their numbers."""
    is_enlarged: List[bool] = []
    found = set()
    for number, node in enumerate(model.graph.node):
        from_enlarged = [is_enlarged[source] for source in before[number]]
        if len(from_enlarged) > 1 and any(from_enlarged):
            found.add(number)
        is_enlarged.append(
            node.op_type == "Resize"
            or (node.op_type != "Conv" and len(from_enlarged) == 1 and from_enlarged[0])
        )
    return found


def _convs_in_front(start: int, before: List[List[int]], convs: Set[int]) -> Set[int]:
    """The convolutions from which a path without another convolution leads to a node."""
    found, seen, waiting = set(), set(), list(before[start])
    while waiting:
        number = waiting.pop()
        if number in seen:
            continue
        seen.add(number)
        if number in convs:
            found.add(number)
        else:
            waiting += before[number]
    return found
