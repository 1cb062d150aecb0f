"""Do two trees of parse.py mean the same answer? `equivalent` at the end is the door.

Algebra needs no computer algebra system: two expressions are equal if they agree at fixed points
(Schwartz-Zippel). Numbers stay exact where that is cheap. Whatever has no value (1/0, a tower of
powers) or takes more than MAX_WORK steps raises Unparsable or ArithmeticError, which the caller
counts as "not equal".
"""

import cmath
import math
import threading
from fractions import Fraction

from answers.parse import Node, Unparsable, negate, num, parts, times, variables
from answers.text import DEGREE, PERCENT

MAX_BITS, MAX_MEMBERS = 16384, 60  # of an exact number, of a list
MAX_WORK = 40_000  # steps of one comparison; a step takes about a microsecond


# What the running comparison may still spend; outside of one, nothing is counted.
work = threading.local()


def spend(steps: int) -> None:
    work.left = getattr(work, "left", math.inf) - steps
    if work.left < 0:
        raise Unparsable("too much work")


# ---- 1. values ---------------------------------------------------------------------------------
def contains(node, tag, data=None):
    return any(n.tag == tag and data in (None, n.data) for n in parts(node))


def exact(x):
    return isinstance(x, (int, Fraction))


def bits(x):
    return max(x.numerator.bit_length(), x.denominator.bit_length())


def small(x):
    """A value as it is passed on: finite, whole numbers as int, exact ones of bounded size."""
    if isinstance(x, (float, complex)):
        if not cmath.isfinite(x):
            raise Unparsable("not finite")
        return x
    if (size := bits(x)) > 512:
        spend(size // 32)
    if size > MAX_BITS:
        raise Unparsable("number too large")
    return x.numerator if x.denominator == 1 else x


def power(a, b):
    """a ** b, exact where that is cheap, float or complex otherwise; never large."""
    if exact(a) and isinstance(b, int):
        if a not in (0, 1, -1) and bits(a) * abs(b) > MAX_BITS:
            raise Unparsable("power too large")
        b = b % 2 if a in (1, -1) else b
        return small(a**b if b >= 0 else Fraction(a) ** b)
    if exact(a) and exact(b) and a < 0 and b.denominator % 2:  # the real cube root of -8
        return power(-power(-a, Fraction(1, b.denominator)), b.numerator)
    if isinstance(a, complex) or isinstance(b, complex) or (a < 0 and not isinstance(b, int)):
        return complex(a) ** complex(b)
    return float(a) ** float(b)


_TRIG = {"sin", "cos", "tan", "cot", "sec", "csc"}
_INVERSE = {"cot": "tan", "sec": "cos", "csc": "sin"}
_MATH_NAME = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
_LOG_BASE = {"ln": math.e, "log": math.e, "lg": 10}


def call(name, args):
    """A function of the parser's allow-list at numbers."""
    x = args[0]
    if name in ("factorial", "binom"):
        if not all(isinstance(a, int) and 0 <= a <= 1000 for a in args):
            raise Unparsable(f"{name} out of bounds")
        return math.factorial(x) if name == "factorial" else math.comb(*args)
    if len(args) != 1 and name != "log":
        raise Unparsable(f"{name} of {len(args)} numbers")
    if name == "abs":
        return abs(x)
    if name in _INVERSE:
        y = call(_INVERSE[name], args)
        return 1 / y if abs(y) > 1e-12 else math.inf
    if name in _LOG_BASE:
        return math.log(x) / math.log(args[1] if len(args) > 1 else _LOG_BASE[name])
    y = getattr(math, _MATH_NAME.get(name, name))(x)
    return y if abs(y) < 1e12 or name != "tan" else math.inf


def value(node: Node, env: dict[str, float] | None = None, trig: bool = False):
    """The number that a tree means: exact where possible, else float or complex.

    `env` gives the variables. Degrees are radians inside trigonometric functions (`trig`), else
    plain numbers. Raises Unparsable or ArithmeticError if there is no finite number."""
    tag, data = node.tag, node.data
    if tag == "n":
        return data[0]
    if tag == "v" and env and data in env:
        return env[data]
    if tag == "c" and data != "inf":
        return math.pi if data == "pi" else math.e if data == "e" else 1j
    if tag not in ("+", "*", "/", "^", "f", "q"):
        raise Unparsable(f"no number: {tag}")
    if tag == "f":
        trig = data in _TRIG
    args = [value(k, env, trig) for k in node.kids]
    if tag in "+*":
        out = args[0]
        for x in args[1:]:
            out = small(out + x if tag == "+" else out * x)
        return out
    if tag == "/":
        top, bottom = args
        out = Fraction(top) / bottom if exact(top) and exact(bottom) else top / bottom
    elif tag == "^":
        out = power(*args)
    elif tag == "f":
        out = call(data, args)
    else:
        out = args[0] * math.pi / 180 if data == DEGREE and trig else args[0]
        out = Fraction(out) / 100 if data == PERCENT and exact(out) else out
    return small(out)


# ---- 2. numbers and expressions ----------------------------------------------------------------
def close(x, y):
    return abs(x - y) <= 1e-9 * max(abs(x), abs(y), 1e-3)


def resolution(node):
    """Unit of the last written place of a decimal (5.40, 1.5*10^3, 2.5 million), else None."""
    if node.tag == "n":
        return node.data[1]
    if node.tag != "*" or variables(node):
        return None
    places = [resolution(k) for k in node.kids]
    written = [place for place in places if place is not None]
    if len(written) != 1:
        return None
    rest = tuple(k for k, place in zip(node.kids, places) if place is None)
    factor = value(Node("*", None, rest))
    return written[0] * abs(factor) if exact(factor) else None


def same_number(a: Node, b: Node) -> bool:
    """Equal exactly (to 1e-9 for irrational numbers), or one is the rounding of the other.

    A rounding needs 4 significant digits: 166.67 for 166.6667, 0.3333 for 1/3; but 0.33 is no
    third and 3.14 is not pi."""
    x, y = value(a), value(b)
    if x == y if exact(x) and exact(y) else close(x, y):
        return True
    u, v = resolution(a), resolution(b)
    if isinstance(x, complex) or isinstance(y, complex) or u == v:
        return False
    if abs(x - y) <= 1e-12 * abs(x):  # 0.30000000000000004
        return True
    if u is None or (v is not None and v > u):
        x, y, u = y, x, v  # x is the coarser decimal, u its last place
    slack = 1 + Fraction(1, 10**9) if exact(y) else 1.000001
    return abs(x) >= 1000 * u and abs(x - y) <= u / 2 * slack


# Fixed "random" points: five of positive numbers, then four of mixed signs, since roots and
# absolute values differ there.
_POINTS = (0.3719, 0.8243, 1.2957, 2.6181, 4.7731, 0.5417, 1.8713, 3.3391, 0.1173, 6.1031)


def samples(a, b):
    """Pairs of values at the points where both are defined.

    Complex values count only if a tree speaks of i."""
    nodes = parts(a) + parts(b)
    names = sorted({n.data for n in nodes if n.tag == "v"})
    use_complex = Node("c", "i") in nodes
    for k in range(9):
        spend(len(nodes))
        env = {}
        for j, name in enumerate(names):
            sign = -1 if k > 4 and (j + k) % 3 else 1
            env[name] = sign * _POINTS[(3 * j + k) % 10] * (1 + 0.0137 * j)
        try:
            x, y = value(a, env), value(b, env)
        except (ArithmeticError, ValueError, TypeError):
            continue
        if use_complex or not (isinstance(x, complex) or isinstance(y, complex)):
            yield x, y


def infinite(node):
    """1 or -1 for plus or minus infinity written as such, else 0."""
    if node.tag == "*" and len(node.kids) == 2 and node.kids[0] == num(-1):
        return -infinite(node.kids[1])
    return int(node == INF)


def same_expr(a, b):
    """Numbers by same_number; expressions with variables by their values at points."""
    nodes = parts(a) + parts(b)
    spend(len(nodes))
    if INF in nodes:
        return infinite(a) == infinite(b) != 0
    names = {n.data for n in nodes if n.tag == "v"}
    if not names:
        return same_number(a, b)
    seen = 0
    for x, y in samples(a, b) if len(names) <= 12 else ():
        if not close(x, y):
            return False
        seen += 1
    return seen >= 3


# ---- 3. units ----------------------------------------------------------------------------------
def split_unit(node):
    """(number, unit or None); generic `units` say nothing."""
    if node.tag != "q":
        return node, None
    return node.kids[0], node.data if any(name != "unit" for name, _ in node.data[1]) else None


def same_quantity(a, b):
    """100 cm = 1 m, 50% = 0.5 = 50, 90 degrees = pi/2. Only one of the two may lack its unit."""
    (x, unit), (y, unit_y) = split_unit(a), split_unit(b)
    if unit and unit_y:
        if unit[0] != unit_y[0]:
            x = times(num(unit[0] / unit_y[0]), x)
        return unit[1] == unit_y[1] and same_expr(x, y)
    if unit_y:
        x, y, unit = y, x, unit_y
    if unit == PERCENT and same_expr(times(num(Fraction(1, 100)), x), y):
        return True
    if unit == DEGREE:
        angles = {("c", "pi"), *(("f", name) for name in _MATH_NAME)}
        if any(n[:2] in angles for n in parts(y)):
            x = Node("/", None, (times(x, Node("c", "pi")), num(180)))
    return same_expr(x, y)


# ---- 4. names and equations --------------------------------------------------------------------
def heading(side, others):
    """The name that one side gives to the others: x, f(x), f^{-1}(x), (x, y), |AB|, sin A."""
    head, first = None, side.kids[0] if side.kids else side
    if side.tag == "v":
        head = side.data
    elif side.tag == "seq" and side.data[0] == "(" and all(k.tag == "v" for k in side.kids):
        head = ",".join(k.data for k in side.kids)
    elif side.tag == "f" and first.tag == "v" and side.data in {"abs", *_TRIG}:
        head = f"{side.data}({first.data})"
    elif side.tag == "*" and len(side.kids) == 2 and side.kids[1].tag in ("v", "n", "rel", "set"):
        f = first.kids[0] if first.tag == "^" else first
        head = f.data if f.tag == "v" and f.data[:1] in "fghpqyPFGHRSVAT" else None
    return head if head and not any(head in variables(other) for other in others) else None


def unname(node):
    """`x = 5` -> ("x", 5), `f(x) = x+1` -> ("f", x+1), `A(2, 3)` -> ("A", (2, 3)), else ("", node).

    In a chain of equal numbers any stands for all; 6 = 5 is no number, and 10/3 ~ 3.33 is one if
    it rounds so."""
    kids = node.kids
    if node.tag == "*" and [k.tag for k in kids] == ["v", "seq"]:
        return kids[0].data, kids[1]
    if node.tag != "rel" or not set(node.data) <= {"=", "~", "in"}:
        return "", node
    ops, name = node.data, ""
    while len(kids) > 1 and (head := heading(kids[0], kids[1:])):  # AB = CD = 6
        name, kids, ops = name or head, kids[1:], ops[1:]
    if not name and ops == ("=",) and (head := heading(kids[1], kids[:1])):  # 6 = x
        name, kids, ops = head, kids[:1], ()
    if "in" in ops or (not name and any(map(variables, kids))):
        return "", node
    kids = [k for k in kids if not variables(k)] or kids  # AOB = 2 ACB = 80
    for p, q, op in zip(kids, kids[1:], ops):
        if not (same_quantity(p, q) or (op == "~" and rounds_to(p, q))):
            return "", node
    return name, kids[0]


def rounds_to(p, q):
    """Is q a decimal that p rounds to?"""
    p, q = split_unit(p)[0], split_unit(q)[0]
    u = resolution(q)
    return u is not None and abs(value(p) - value(q)) <= u / 2 * 1.000001


_FLIP = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def same_relation(a, b):
    """Equations or inequalities: left minus right agree up to a factor (a positive one for < >)."""
    if len(a.kids) != 2 or len(b.kids) != 2:
        return len(a.kids) == len(b.kids) and a.data == b.data and all(map(same, a.kids, b.kids))
    sides = []
    for (left, right), (op,) in ((a.kids, a.data), (b.kids, b.data)):
        if op[0] == ">":
            left, right, op = right, left, _FLIP[op]
        sides.append((op, Node("+", None, (left, negate(right)))))
    (op, p), (op_b, q) = sides
    if op != op_b or op == "in":
        return False
    points = list(samples(p, q))
    if any((abs(x) < 1e-9) != (abs(y) < 1e-9) for x, y in points):
        return False
    ratios = [x / y for x, y in points if abs(y) >= 1e-9]
    if len(ratios) < 3 or not all(close(r, ratios[0]) for r in ratios):
        return False
    return op in ("=", "~", "!=") or ratios[0] > 0


# ---- 5. sets of reals: lists of intervals (low, closed, high, closed) ---------------------------
INF = Node("c", "inf")
MINUS_INF = negate(INF)
REALS = Node("w", "reals")
_INTEGERS = [Node("w", name) for name in ("integers", "naturals", "rationals")]


def outside(low, high, closed=False):
    """All reals below low and above high."""
    return [(MINUS_INF, False, low, closed), (high, closed, INF, False)]


def intervals(node):
    """A set of reals as a list of intervals from left to right, else None."""
    tag, data, kids = node
    if node == REALS:
        return [(MINUS_INF, False, INF, False)]
    if tag == "seq":
        opener, closer, word = data
        if opener in ("(", "[") and len(kids) == 2:
            return [(kids[0], opener == "[", kids[1], closer == "]")]
        if opener == "" and word == "or":
            return joined(kids)
        if opener == "" and word == "and" and all(k.tag == "rel" for k in kids):
            return overlap(kids)
    if tag == "set":
        left, right = kids
        if data == "\\cup":
            return joined(kids)
        if data == "\\cap":
            return overlap(kids)
        if left == REALS and right.tag == "seq" and len(right.kids) == 1:  # R without {2}
            return outside(right.kids[0], right.kids[0])
    return of_relation(node) if tag == "rel" else None


def joined(nodes):
    lists = [intervals(k) for k in nodes]
    return (
        None
        if None in lists
        else sorted(sum(lists, []), key=lambda p: -math.inf if infinite(p[0]) else value(p[0]))
    )


def overlap(nodes):
    """x > 1 and x < 3: two rays."""
    lists = [intervals(k) for k in nodes]
    if len(lists) != 2 or not all(found and len(found) == 1 for found in lists):
        return None
    a, b = sorted((found[0] for found in lists), key=lambda ray: infinite(ray[0]) < 0)
    return [a[:2] + b[2:]] if infinite(a[2]) and infinite(b[0]) else None


def of_relation(node):
    """Intervals of x > 5, 1 < x <= 3, |x| < 2, x != 0, x in S."""
    kids, ops, first = node.kids, node.data, node.kids[0]
    if ops == ("in",):
        return intervals(kids[1])
    closed = len(ops[0]) == 2
    if first.tag == "f" and first.data == "abs" and first.kids[0].tag == "v":
        if len(ops) == 1 and ops[0] in _FLIP:
            low, high = negate(kids[1]), kids[1]
            inside = [(low, closed, high, closed)]
            return inside if ops[0][0] == "<" else outside(low, high, closed)
    names = [k for k, p in enumerate(kids) if p.tag == "v"]
    if len(names) != 1 or sum(bool(variables(p)) for p in kids) != 1:
        return None
    at = names[0]
    if ops == ("!=",):
        return outside(kids[1 - at], kids[1 - at])
    if not set(ops) <= set(_FLIP) or len(ops) > 2:
        return None
    if len(ops) == 2 and (at != 1 or ops[0][0] != ops[1][0]):
        return None
    low, high = (MINUS_INF, False), (INF, False)
    for k, op in enumerate(ops):  # each operator bounds the variable from one side
        other, op = (kids[k], _FLIP[op]) if at == k + 1 else (kids[k + 1], op)
        if op[0] == "<":
            high = other, op == "<="
        else:
            low = other, op == ">="
    return [low + high]


def same_region(a, b):
    """Rule for intervals, inequalities, unions; None if it does not apply."""
    tags = {a.tag, b.tag}
    words = {n.data[2] for n in (a, b) if n.tag == "seq"}
    if not (tags & {"rel", "set", "w"} or words & {"or", "and"}):
        return None
    first, second = intervals(a), intervals(b)
    if first and second:
        return len(first) == len(second) and all(map(same_interval, first, second))
    if tags & {"set", "w"}:
        return a[:2] == b[:2] and a.tag == "set" and all(map(same, a.kids, b.kids))
    return False if "rel" in tags and not (several(a) and several(b)) else None


def same_interval(p, q):
    return p[1::2] == q[1::2] and same(p[0], q[0]) and same(p[2], q[2])


# ---- 6. lists, and the verdict -----------------------------------------------------------------
def same_ratio(a, b):
    """Rule for 1:2:3 = 2:4:6; two parts are a fraction."""
    if not a.tag == b.tag == "ratio":
        return None
    if len(a.kids) != len(b.kids):
        return False
    first, second = a.kids[0], b.kids[0]
    return all(same_expr(times(p, second), times(q, first)) for p, q in zip(a.kids, b.kids))


def vector(node):
    """A matrix of one row or one column as a tuple."""
    rows = node.kids
    if node.data[2] != "matrix" or (len(rows) > 1 and any(len(row.kids) != 1 for row in rows)):
        return node
    return Node("seq", ("(", ")", ""), tuple(cell for row in rows for cell in row.kids))


def same_ordered(a, b):
    """Rule for points, vectors, matrices; x = 1, y = 2 is (1, 2), but x = 1, x = 2 is none."""
    if not a.tag == b.tag == "seq":
        return None
    if (a.data[2] == "matrix") != (b.data[2] == "matrix"):
        a, b = vector(a), vector(b)
    fences, words = [n.data[0] + n.data[1] for n in (a, b)], (a.data[2], b.data[2])
    openers = (a.data[0], b.data[0])
    if "(" not in openers and openers != ("[", "["):
        return None
    if len(a.kids) != len(b.kids) or "{" in openers or "or" in words:
        return False
    half_open = [fence in ("(]", "[)") for fence in fences]
    brackets_count = all(openers) and len(a.kids) == 2
    if half_open[0] != half_open[1] or (brackets_count and fences[0] != fences[1]):
        return False
    members = []
    for seq in (a, b):
        names = [unname(k)[0] for k in seq.kids]
        order = range(len(names))
        if all(names):
            if len(set(names)) < len(names):
                return False
            order = sorted(order, key=names.__getitem__)
        members.append([seq.kids[k] for k in order])
    return all(map(same, *members))


def several(node):
    """The members of a list, a set or a plus-minus, else None."""
    if node.tag == "seq":
        if node.data[0] not in ("", "{"):
            return None
        return [m for k in node.kids for m in (several(k) if contains(k, "pm") else None) or [k]]
    return [choose_sign(node, 1), choose_sign(node, -1)] if contains(node, "pm") else None


def choose_sign(node, sign):
    """Reads every plus-minus as plus (sign 1) or minus (-1); minus-plus the other way round."""
    kids = tuple(choose_sign(k, sign) for k in node.kids)
    if node.tag == "pm":
        return kids[0] if sign * node.data > 0 else negate(kids[0])
    return node._replace(kids=kids)


def members(node, other):
    """several(), and [2003, 2004] against a list without brackets."""
    listed = other.tag == "seq" and not other.data[0] and other.data[2] != "or"
    if listed and node.tag == "seq" and node.data[:2] == ("[", "]"):
        return list(node.kids)
    return several(node)


def without_repeats(nodes):
    return [x for k, x in enumerate(nodes) if not any(same(x, y) for y in nodes[:k])]


def same_unordered(a, b):
    """Rule for lists and sets: the same members in any order; in a set, {2, 2} is {2}."""
    first, second = members(a, b), members(b, a)
    if first is None and second is None:
        return None
    first, second = first or [a], second or [b]
    if max(len(first), len(second)) > MAX_MEMBERS:
        return False
    lists = [n for n in (a, b) if n.tag == "seq"]
    if not lists or any(n.data[0] == "{" or n.data[2] == "or" for n in lists):
        first, second = without_repeats(first), without_repeats(second)
    if len(first) != len(second) or (first[0] is a and second[0] is b):
        return False
    for x in first:
        k = next((k for k, y in enumerate(second) if same(x, y)), None)
        if k is None:
            return False
        second = second[:k] + second[k + 1 :]
    return True


def without_integer_note(node):
    """x = pi/4 + k pi, k in Z -> x = pi/4 + k pi"""
    if node.tag != "seq" or node.data[0]:
        return node
    left = [k for k in node.kids if k[:2] != ("rel", ("in",)) or k.kids[1] not in _INTEGERS]
    return left[0] if len(left) == 1 < len(node.kids) else node


def same(a, b):
    """Names first (x = 5 against 5), then the first rule that applies."""
    if a == b:
        return True
    spend(5)
    a, b = without_integer_note(a), without_integer_note(b)
    (name_a, x), (name_b, y) = unname(a), unname(b)
    relations = a.tag == b.tag == "rel"
    if "rel" in (x.tag, y.tag):
        if relations and not (intervals(a) and intervals(b)):
            return same_relation(a, b)
    elif name_a or name_b:
        # f(x) = x^2 is y = x^2, and names of more than 3 letters are labels (Area, Surface).
        function = {name_a, name_b} & set("fgh") and variables(x) and variables(y)
        compatible = name_a == name_b or not (name_a and name_b) or function
        compatible = compatible or max(len(name_a), len(name_b)) > 3
        return (compatible and same(x, y)) or (relations and same_relation(a, b))
    for rule in (same_ratio, same_region, same_ordered, same_unordered):
        if (verdict := rule(x, y)) is not None:
            return verdict
    return "seq" not in (x.tag, y.tag) and same_quantity(x, y)


def equivalent(a: Node, b: Node) -> bool:
    """Do two trees mean the same answer? Raises Unparsable, ArithmeticError or TypeError."""
    work.left = MAX_WORK
    try:
        return same(a, b)
    finally:
        work.left = math.inf
