"""The inner loops of the tiles for float32 rows in the instructions of AVX2, as few of them as there can be.

A step is two loads, and a broadcast and two multiply-adds for each row: 20 instructions for 6 rows (21 where b is
bfloat16). LLVM's own code for float32 has up to a quarter more, unrolled or not, since it computes addresses anew. That
costs little while a core is ours alone; but where another guest of the machine uses the same core, each is given some
three instructions a cycle, and every one of them counts.
"""

from __future__ import annotations

from llvmlite import ir

STEPS = 8  # written one after another, so that the loop around them adds one instruction to each
LANES = 8
# How a row of b comes into two registers, by the form of its numbers; of bfloat16 the even columns come into `low`
LOADS = {
    "float32": ("vmovups {row}, {low}", "vmovups 32{row}, {high}"),
    "float16": ("vcvtph2ps {row}, {low}", "vcvtph2ps 16{row}, {high}"),
    "bfloat16": ("vmovups {row}, {high}", "vpslld $$16, {high}, {low}", "vpand {odd}, {high}, {high}"),
}
# Row i of a matrix, as an address can name it: row 0, 2 or 3, and no, 1, 2 or 4 strides more
ROWS = {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (3, 0), 4: (3, 1), 5: (3, 2), 6: (2, 4), 7: (3, 4)}


def steps(
    builder: ir.IRBuilder, form: str, rows: int, a: ir.Value, a_stride: ir.Value, b: ir.Value, b_stride: ir.Value,
    k: ir.Value, sums: list[ir.Value],
) -> list[ir.Value]:  # fmt: skip
    """STEPS times sums[r] + a[r, k] * b[k], for up to 6 rows; sums: vectors of 2 * LANES numbers.

    form: of b. a, b: pointers to [0, 0]; strides: elements from one row to the next.
    """
    index, count = k.type, 2 * rows

    def lanes(first: int, many: int) -> ir.Constant:
        return ir.Constant(ir.VectorType(ir.IntType(32), many), list(range(first, first + many)))

    def place(pointer: ir.Value, first: ir.Value, stride: ir.Value, row: int) -> ir.Value:
        return builder.gep(pointer, [builder.add(first, builder.mul(stride, index(row)))])

    # Operands: the sums, which stay where they are, and three registers of its own; then what is given, and a mask,
    # with which 6 rows take all 16 vector registers
    b_first, size = builder.mul(k, b_stride), 4 if form == "float32" else 2
    given = [
        *(place(a, k, a_stride, row) for row in (0, 3)), builder.mul(a_stride, index(4)),
        *(place(b, b_first, b_stride, row) for row in (0, 2, 3)), builder.mul(b_stride, index(size)),
    ]  # fmt: skip
    low, high, x, a_0, a_3, a_next, b_0, b_2, b_3, b_next, odd = (f"${count + i}" for i in range(4 + len(given)))
    masks = [ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0xFFFF0000] * LANES)] if form == "bfloat16" else []

    def address(row: int, near: dict[int, str], stride: str) -> str:
        base, strides = ROWS[row]
        return f"({near[base]},{stride},{strides})" if strides else f"({near[base]})"

    text = []
    for step in range(STEPS):
        b_row = address(step, {0: b_0, 2: b_2, 3: b_3}, b_next)
        text += [load.format(row=b_row, low=low, high=high, odd=odd) for load in LOADS[form]]
        for r in range(rows):
            text += [f"vbroadcastss {4 * step}{address(r, {0: a_0, 3: a_3}, a_next)}, {x}"]
            text += [f"vfmadd231ps {half}, {x}, ${2 * r + i}" for i, half in enumerate((low, high))]

    vector = ir.VectorType(ir.FloatType(), LANES)
    results = ir.LiteralStructType([vector] * (count + 3))
    kind = ir.FunctionType(results, [*(value.type for value in given + masks), *[vector] * count])
    operands = ["=&x"] * (count + 3) + ["r"] * len(given) + ["x"] * len(masks)
    operands += [*map(str, range(count)), "~{memory}"]
    code = ir.InlineAsm(kind, "\n".join(text), ",".join(operands), side_effect=True)
    halves = [builder.shuffle_vector(total, total, lanes(i, LANES)) for total in sums for i in (0, LANES)]
    found = builder.call(code, [*given, *masks, *halves])
    halves = [builder.extract_value(found, i) for i in range(count)]
    return [builder.shuffle_vector(*halves[2 * r : 2 * r + 2], lanes(0, 2 * LANES)) for r in range(rows)]
