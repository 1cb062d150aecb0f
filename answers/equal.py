"""Do two trees of parse.py mean the same answer? `equivalent` at the end is the door.

Algebra needs no computer algebra system: two expressions are equal if they agree at fixed points
(Schwartz-Zippel). Numbers stay exact where that is cheap. Whatever has no value (1/0, a tower of
powers) or takes more than MAX_WORK steps raises Unparsable or ArithmeticError, which the caller
counts as "not equal".
"""

import cmath
import functools
import math
import operator
import threading
from bisect import bisect
from fractions import Fraction

from answers.parse import LABEL, SERIES, Node, Unparsable, negate, num, parts, times, variables
from answers.text import DEGREE, PERCENT

MAX_BITS, MAX_MEMBERS, MAX_TERMS = 32768, 60, 500  # of an exact number, a list, a sum
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
    if isinstance(x, Matrix):
        return x
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
    if isinstance(a, Matrix) and b in range(1, 65):
        return math.prod([a] * b)
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
_MATH_NAME = {"arc" + name: "a" + name for name in "sin cos tan sinh cosh tanh".split()}
_OF_NUMBERS = {"mod": operator.mod, "max": max, "min": min, "gcd": math.gcd, "lcm": math.lcm}
_OF_NUMBERS |= {"lfloor": math.floor, "lceil": math.ceil}
_LOG_BASE = {"ln": math.e, "log": math.e, "lg": 10}


def call(name, args):
    """A function of the parser's allow-list at numbers."""
    x = args[0]
    if name in ("factorial", "binom"):
        if any(isinstance(a, float) for a in args):  # (n + 1)! at a point between whole numbers
            top, *rest = [math.gamma(a + 1) for a in ([*args, x - args[1]] if args[1:] else args)]
            return top / math.prod(rest)
        if not all(isinstance(a, int) and 0 <= a <= 3000 for a in args):
            raise Unparsable(f"{name} out of bounds")
        return math.factorial(x) if name == "factorial" else math.comb(*args)
    if name in _OF_NUMBERS:
        return _OF_NUMBERS[name](*args)
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
    if tag in ("v", "c") and env and data in env:  # i may be the index of a sum
        return env[data]
    if tag == "c" and data != "inf":
        return math.pi if data == "pi" else math.e if data == "e" else 1j
    if is_matrix(node):
        rows = [k.kids if data[2] == "matrix" else (k,) for k in node.kids]
        return Matrix([[value(k, env, trig) for k in row] for row in rows])
    if tag == "f" and data in SERIES:
        return series(node, env or {})
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


def series(node, env):
    """A sum or product between whole numbers; else a number that other bodies or bounds change."""
    low, high, body = node.kids
    if low.tag == "rel" and low.kids[0].tag in ("v", "c"):
        name, low = low.kids[0].data, low.kids[1]
        env = env | {name: 0.7391}  # so that the name of the index does not matter
    first, last = value(low, env), value(high, env)
    if node.data in ("lim", "int") or not isinstance(first, int) or not isinstance(last, int):
        return (first + 0.577) * (last + 1.618) * (value(body, env) + ord(node.data[0]) ** 0.5)
    if last - first > MAX_TERMS:
        raise Unparsable("too many terms")
    sign, out = (operator.add, 0) if node.data == "sum" else (operator.mul, 1)
    for k in range(first, last + 1):
        spend(len(parts(body)))
        out = small(sign(out, value(body, env | {name: k})))
    return out


def is_matrix(node):
    """Is it a matrix, or a tuple, which is a column?"""
    return node.tag == "seq" and (node.data[2] == "matrix" or node.data[:2] == ("(", ")"))


class Matrix(list):
    """Rows of numbers with the arithmetic that value() uses; a wrong shape is a ValueError."""

    def __init__(self, rows):
        super().__init__(rows)
        spend(1 + sum(map(len, self)))

    def __add__(self, other):
        rows = zip(self, other, strict=True)
        return Matrix([[small(x + y) for x, y in zip(*pair, strict=True)] for pair in rows])

    def __mul__(self, other):
        if not isinstance(other, Matrix):
            return Matrix([[small(x * other) for x in row] for row in self])
        spend(len(self) * sum(map(len, other)))
        columns = [*zip(*other, strict=True)]
        pairs = [[zip(row, column, strict=True) for column in columns] for row in self]
        return Matrix([[small(sum(x * y for x, y in cell)) for cell in row] for row in pairs])

    __rmul__ = __mul__  # of a number

    def __abs__(self):
        """The determinant, along the first row; the limit of work ends it at about 7 rows."""
        if {len(self)} != {*map(len, self)}:
            raise Unparsable("no square")
        if not self[1:]:
            return self[0][0]
        minors = [Matrix([row[:k] + row[k + 1 :] for row in self[1:]]) for k in range(len(self))]
        return small(sum((-1) ** k * x * abs(minors[k]) for k, x in enumerate(self[0]) if x))


# ---- 2. numbers and expressions ----------------------------------------------------------------
def close(x, y):
    if isinstance(x, Matrix) or isinstance(y, Matrix):
        alike = type(x) is type(y) and [*map(len, x)] == [*map(len, y)]
        return alike and all(map(close, sum(x, []), sum(y, [])))
    floor = 1e-3 if x == 0 or y == 0 else 0  # sin(pi) is 0, but 1.6e-19 is no 1.7e-19
    return abs(x - y) <= 1e-9 * max(abs(x), abs(y), floor)


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
    if isinstance(x, (complex, Matrix)) or isinstance(y, (complex, Matrix)) or u == v:
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
_NAMED = {"abs", "gcd", "lcm", "max", "min", *_TRIG, *SERIES}  # with letters, they name a value


def heading(side, others):
    """The name that one side gives to the others: x, f(x), f^{-1}(x), (x, y), |AB|, sin A."""
    head, own, first = None, None, side.kids[0] if side.kids else side
    if side.tag == "v":
        head = side.data
    elif side.tag == "seq" and side.data[0] == "(" and all(k.tag == "v" for k in side.kids):
        head = ",".join(k.data for k in side.kids)
    elif side.tag in ("/", "ratio") and all(k.tag == "v" for k in side.kids):  # AB : BC
        described = side.tag == "ratio" or any(not k.data.islower() for k in side.kids)
        head = ":".join(k.data for k in side.kids) if described else None
    elif side.tag == "f" and side.data in _NAMED and (side.data != "abs" or first.tag == "v"):
        head = str(side) if variables(side) else None
        own = set() if side.data in SERIES else variables(side)  # \int x dx has x on both sides
    elif side.tag == "*" and len(side.kids) == 2 and side.kids[1].tag in ("v", "n", "rel", "set"):
        f = first.kids[0] if first.tag == "^" else first
        head = f.data if f.tag == "v" and f.data[:1] in "fghpqyPFGHRSVATWE" else None
    own = {head} if own is None else own
    return head if head and not any(own & variables(other) for other in others) else None


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


_FLIP = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "!=": "!="}


def upward(node):
    """a > b > c as c < b < a."""
    if node.data[0][0] != ">" or not set(node.data) <= set(_FLIP):
        return node
    return Node("rel", tuple(_FLIP[op] for op in node.data[::-1]), node.kids[::-1])


def same_relation(a, b):
    """Equations or inequalities: left minus right agree up to a factor (a positive one for < >)."""
    a, b = upward(a), upward(b)
    if len(a.kids) != 2 or len(b.kids) != 2:
        return len(a.kids) == len(b.kids) and a.data == b.data and all(map(same, a.kids, b.kids))
    (op,), (op_b,) = a.data, b.data
    p, q = (Node("+", None, (n.kids[0], negate(n.kids[1]))) for n in (a, b))
    if op != op_b or op == "in":
        return False
    points = [pair for pair in samples(p, q) if not isinstance(pair[0], Matrix)]
    if any((abs(x) < 1e-9) != (abs(y) < 1e-9) for x, y in points):
        return False
    ratios = [x / y for x, y in points if abs(y) >= 1e-9]
    if len(ratios) < 3 or not all(close(r, ratios[0]) for r in ratios):
        return False
    return op in ("=", "~", "!=") or ratios[0] > 0


# ---- 5. sets of reals ---------------------------------------------------------------------------
# A set is the sorted list of its borders: at each (value, side) membership changes, just before the
# value (side 0) or just behind it (side 1). [1, 2) is [(1, 0), (2, 0)], {3} is [(3, 0), (3, 1)].
INF = Node("c", "inf")
ALL = [(-math.inf, 1), (math.inf, 0)]
_INTEGERS = [Node("w", name) for name in ("integers", "naturals", "rationals")]
_SET_SIGNS = {"\\cup": max, "\\cap": min, "\\setminus": int.__gt__}  # of two memberships


def combine(sign, a, b):
    """The borders of a union, an intersection or a difference."""
    out = []
    spend(len(a) + len(b))
    for border in sorted({*a, *b}):
        inside = _SET_SIGNS[sign](bisect(a, border) % 2, bisect(b, border) % 2)
        if inside != len(out) % 2:
            out.append(border)
    return out


def point(node, side, ends):
    """A border at the value of a tree, which `ends` remembers. Each letter has its own value."""
    if sign := infinite(node):
        return sign * math.inf, int(side)
    x = value(node, {c: int.from_bytes(c.encode()[:6], "big") for c in variables(node)})
    x = x if exact(x) else float(f"{x:.12g}")
    ends.setdefault(x, node)
    return x, int(side)


def region(node, ends):
    """The borders of a set; None if it is none, or if an end has no value."""
    try:
        return borders(*node, ends)
    except (ArithmeticError, TypeError, ValueError):
        return None


def borders(tag, data, kids, ends):
    if tag == "w" and data == "reals":
        return ALL
    if tag == "rel":
        return of_relation(kids, data, ends)
    if tag == "seq" and data[0] in ("(", "[") and len(kids) == 2:
        low, high = point(kids[0], data[0] == "(", ends), point(kids[1], data[1] == "]", ends)
        return [low, high] if low < high else None
    if tag == "seq" and data[0] == "{":
        return joined("\\cup", [[point(k, side, ends) for side in (0, 1)] for k in kids])
    if tag in ("n", "q", "+", "*", "/", "^"):
        return [point(Node(tag, data, kids), side, ends) for side in (0, 1)]
    if tag != "set" and (tag != "seq" or data[0]):
        return None
    sets = [borders(*k, ends) for k in kids]
    relations = {frozenset(variables(k)) for k in kids if k.tag == "rel"}
    others = any(k.tag != "rel" for k in kids) and data[2] != "or"
    if None in sets or (tag == "seq" and (len(relations) != 1 or others)):
        return None
    if tag == "set":
        return joined(data, sets)
    both = joined("\\cap", sets) if data[2] != "or" else []
    return both or (joined("\\cup", sets) if data[2] != "and" else both)  # x < 1, x > 5


def joined(sign, sets):
    return functools.reduce(functools.partial(combine, sign), sets) if sets else []


def of_relation(kids, ops, ends):
    """The borders of x > 5, 1 < x <= 3, |x| < 2, x != 0, x in S."""
    if ops in (("in",), ("notin",)):
        inner = borders(*kids[1], ends)
        return inner if ops == ("in",) or inner is None else combine("\\setminus", ALL, inner)
    at = [k for k, p in enumerate(kids) if variables(p)]
    if len(at) != 1 or not heading(kids[at[0]], ()) or not set(ops) <= set(_FLIP):
        return None
    out, name = ALL, kids[at[0]]
    for left, op, right in zip(kids, ops, kids[1:]):  # each bounds the variable from one side
        if name not in (left, right):
            return None
        other, op = (right, op) if name == left else (left, _FLIP[op])
        before, behind = point(other, 0, ends), point(other, 1, ends)
        bounds = {"<": [ALL[0], before], "<=": [ALL[0], behind], "!=": [before, behind]}
        bounds |= {">": [behind, ALL[1]], ">=": [before, ALL[1]]}
        out = combine("\\setminus" if op == "!=" else "\\cap", out, bounds[op])
    if name[:2] == ("f", "abs"):
        out = combine("\\cap", out, [point(num(0), 0, ends), ALL[1]])
        ends |= {-x: negate(node) for x, node in ends.items() if -x not in ends}
        out = combine("\\cup", out, [(-x, 1 - side) for x, side in reversed(out)])
    return out


def same_region(a, b):
    """Rule for intervals, inequalities, unions; None if it does not apply."""
    tags = {a.tag, b.tag}
    lists = [n for n in (a, b) if n.tag == "seq"]
    words = {n.data[2] for n in lists} | {k.tag for n in lists for k in n.kids}
    if not (tags & {"rel", "set", "w"} or words & {"or", "and", "rel"}):
        return None
    trees = [{math.inf: INF, -math.inf: negate(INF)} for _ in (a, b)]
    found = first, second = [*map(region, (a, b), trees)]
    if None not in found:
        ends = [[tree[x] for x, _ in borders] for tree, borders in zip(trees, found)]
        return [side for _, side in first] == [side for _, side in second] and all(map(same, *ends))
    if tags & {"set", "w"}:
        turns = (1, -1) if a.data != "\\setminus" else (1,)
        alike = a[:2] == b[:2] and a.tag == "set"
        return alike and any(all(map(same, a.kids, b.kids[::turn])) for turn in turns)
    return False if "rel" in tags and not (several(a) and several(b)) else None


# ---- 6. lists, and the verdict -----------------------------------------------------------------
def same_ratio(a, b):
    """Rule for 1:2:3 = 2:4:6; two parts are a fraction."""
    if not a.tag == b.tag == "ratio":
        return None
    if len(a.kids) != len(b.kids):
        return False
    first, second = a.kids[0], b.kids[0]
    return all(same_expr(times(p, second), times(q, first)) for p, q in zip(a.kids, b.kids))


def vector(node, other):
    """A matrix of one row or one column as a tuple, with the brackets of the other."""
    rows = node.kids
    if node.data[2] != "matrix" or (len(rows) > 1 and any(len(row.kids) != 1 for row in rows)):
        return node
    fence = other.data[:2] if other.data[:2] == ("[", "]") else ("(", ")")
    return Node("seq", (*fence, ""), tuple(cell for row in rows for cell in row.kids))


def same_ordered(a, b):
    """Rule for points, vectors, matrices; x = 1, y = 2 is (1, 2), but x = 1, x = 2 is none."""
    if not a.tag == b.tag == "seq":
        return None
    if (a.data[2] == "matrix") != (b.data[2] == "matrix"):
        a, b = vector(a, b), vector(b, a)
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
        if relations and None in (region(a, {}), region(b, {})):
            return same_relation(a, b)
    elif name_a or name_b:
        # f(x) = x^2 is y = x^2, and a label (Area, Surface) stands for any name.
        function = {name_a, name_b} & set("fgh") and variables(x) and variables(y)
        compatible = name_a == name_b or not (name_a and name_b) or function
        compatible = compatible or LABEL in name_a + name_b
        return (compatible and same(x, y)) or (relations and same_relation(a, b))
    for rule in (same_ratio, same_region, same_ordered, same_unordered):
        if (verdict := rule(x, y)) is not None:
            return verdict
    if "seq" in (x.tag, y.tag) and not (x.tag != y.tag and is_matrix(x if x.tag == "seq" else y)):
        return False
    return same_quantity(x, y)


def equivalent(a: Node, b: Node) -> bool:
    """Do two trees mean the same answer? Raises Unparsable, ArithmeticError or TypeError."""
    work.left = MAX_WORK
    try:
        return same(a, b)
    finally:
        work.left = math.inf
