"""mathequal.py: do two trees of mathparse.py mean the same answer? `same(a, b)` at the end is the door.

Sections: 1 values, 2 numbers and expressions, 3 units, 4 names and equations, 5 sets of reals, 6 lists and the verdict.
Algebra needs no computer algebra system: two expressions are equal if they agree at fixed points (Schwartz-Zippel), which
is fast and cannot hang. Numbers stay exact where that is cheap and have at most MAX_BITS bits. Whatever has no value (1/0,
a tower of powers) raises Unparsable or ArithmeticError, which the caller counts as "not equal".
"""

import cmath
import math
from fractions import Fraction

from answers.parse import Node, Unparsable, negate, num, times, variables
from answers.text import DEGREE, PERCENT

MAX_BITS = 16384


# ---- 1. values -------------------------------------------------------------------------------------------------------
def contains(node, tag, what=None):
    return (node.tag == tag and what in (None, node.data)) or any(
        contains(k, tag, what) for k in node.kids
    )


def exact(x):
    return isinstance(x, (int, Fraction))


def small(x):
    """A value as it is passed on: finite, whole numbers as int, no exact number of more than MAX_BITS bits."""
    if isinstance(x, (float, complex)):
        if not cmath.isfinite(x):
            raise Unparsable("not finite")
        return x
    if max(x.numerator.bit_length(), x.denominator.bit_length()) > MAX_BITS:
        raise Unparsable("number too large")
    return x.numerator if x.denominator == 1 else x


def power(a, b):
    """a ** b, exact where that is cheap, float or complex otherwise; never large."""
    if exact(a) and isinstance(b, int):
        if (
            a not in (0, 1, -1)
            and max(a.numerator.bit_length(), a.denominator.bit_length()) * abs(b) > MAX_BITS
        ):
            raise Unparsable("power too large")
        b = b % 2 if a in (1, -1) else b
        return small(a**b if b >= 0 else Fraction(a) ** b)
    if exact(a) and exact(b):
        if a < 0 and b.denominator % 2:  # the real cube root of -8
            return power(power(-a, Fraction(1, b.denominator)) * -1, b.numerator)
        if a >= 0 and (root := exact_root(a, b.denominator)) is not None:
            return power(root, b.numerator)
    if isinstance(a, complex) or isinstance(b, complex) or (a < 0 and not isinstance(b, int)):
        return complex(a) ** complex(b)
    return float(a) ** float(b)


def exact_root(a, n):
    """n-th root of a rational number when that is rational (n <= 9, moderate size), else None."""
    if n > 9 or a.numerator.bit_length() > 512 or a.denominator.bit_length() > 512:
        return None
    parts = [math.isqrt(k) if n == 2 else round(k ** (1 / n)) for k in (a.numerator, a.denominator)]
    return (
        small(Fraction(*parts)) if [r**n for r in parts] == [a.numerator, a.denominator] else None
    )


_TRIG = {"sin", "cos", "tan", "cot", "sec", "csc"}
_INVERSE = {"cot": "tan", "sec": "cos", "csc": "sin"}
_MATH_NAME = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}


def call(name, args):
    """A function of the allow-list at numbers."""
    x = args[0]
    if name in ("factorial", "binom"):
        if not all(isinstance(a, int) and 0 <= a <= 1000 for a in args):
            raise Unparsable(f"{name} out of bounds")
        return small(math.factorial(x) if name == "factorial" else math.comb(*args))
    if len(args) != 1 and name != "log":
        raise Unparsable(f"{name} of {len(args)} numbers")
    if name == "abs":
        return abs(x)
    if name in _INVERSE:
        y = call(_INVERSE[name], args)
        return 1 / y if abs(y) > 1e-12 else math.inf
    m = math
    if (
        isinstance(x, complex)
        or (x < 0 and name in ("ln", "log", "lg"))
        or (abs(x) > 1 and name in ("arcsin", "arccos"))
    ):
        m = cmath
    if name in ("ln", "log", "lg"):
        base = 10 if name == "lg" else args[1] if len(args) > 1 else math.e
        return m.log(x) / m.log(base)
    y = getattr(m, _MATH_NAME.get(name, name))(x)
    return y if abs(y) < 1e12 or name != "tan" else math.inf


def value(node, env=None, trig=False):
    """Number of a tree: int or Fraction where exact, else float or complex; env gives the variables. Degrees count as
    radians inside trigonometric functions (trig) and as plain numbers elsewhere. Unparsable if there is no finite one."""
    tag, data = node.tag, node.data
    if tag == "n":
        return data[0]
    if tag == "v" and env and data in env:
        return env[data]
    if tag == "c" and data != "inf":
        return math.pi if data == "pi" else math.e if data == "e" else 1j
    if tag not in ("+", "*", "/", "^", "f", "q"):
        raise Unparsable(f"no number: {tag}")
    args = [value(k, env, data in _TRIG if tag == "f" else trig) for k in node.kids]
    if tag == "+":
        out = sum(args)
    elif tag == "*":
        out = 1
        for x in args:
            out *= x
    elif tag == "/":
        out = (
            Fraction(args[0]) / args[1] if exact(args[0]) and exact(args[1]) else args[0] / args[1]
        )
    elif tag == "^":
        out = power(*args)
    elif tag == "f":
        out = call(data, args)
    else:
        out = args[0] * math.pi / 180 if data == DEGREE and trig else args[0]
        out = Fraction(out) / 100 if data == PERCENT and exact(out) else out
    return small(out)


# ---- 2. numbers and expressions --------------------------------------------------------------------------------------
def close(x, y):
    return abs(x - y) <= 1e-9 * max(abs(x), abs(y), 1e-3)


def resolution(node):
    """Unit of the last written decimal place of a decimal (5.40, 1.5*10^3, 2.5 million), else None."""
    if node.tag == "n":
        return node.data[1]
    if node.tag != "*" or variables(node):
        return None
    places = [resolution(k) for k in node.kids]
    rest = [value(k) for k, p in zip(node.kids, places) if p is None]
    if len(rest) != len(places) - 1 or not all(map(exact, rest)):
        return None
    return next(p for p in places if p is not None) * abs(math.prod(rest))


def same_number(a, b):
    """Equal exactly (1e-9 for irrational numbers), or one is a decimal of at least 4 significant digits to which the
    other, more exact one rounds: 166.67 for 166.6667, 0.3333 for 1/3, but 0.33 is no third and 3.14 is not pi."""
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
    return abs(x) >= 1000 * u and abs(x - y) <= u / 2 * (
        1 + Fraction(1, 10**9) if exact(y) else 1.000001
    )


# fixed "random" points: five of positive numbers, then four of mixed signs, where roots and moduli tell
_POINTS = (0.3719, 0.8243, 1.2957, 2.6181, 4.7731, 0.5417, 1.8713, 3.3391, 0.1173, 6.1031)


def samples(a, b, names):
    """Pairs of values at the points where both are defined; complex values count only if a tree speaks of i."""
    use_complex = contains(a, "c", "i") or contains(b, "c", "i")
    for k in range(9):
        env = {
            n: _POINTS[(3 * j + k) % 10] * (1 + 0.0137 * j) * (-1 if k > 4 and (j + k) % 3 else 1)
            for j, n in enumerate(sorted(names))
        }
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
    if contains(a, "c", "inf") or contains(b, "c", "inf"):
        return infinite(a) == infinite(b) != 0
    names = variables(a) | variables(b)
    if not names:
        return same_number(a, b)
    seen = 0
    for x, y in samples(a, b, names) if len(names) <= 12 else ():
        if not close(x, y):
            return False
        seen += 1
    return seen >= 3


# ---- 3. units --------------------------------------------------------------------------------------------------------
def split_unit(node):
    """(number, unit or None); generic `units` say nothing."""
    if node.tag != "q":
        return node, None
    return node.kids[0], (node.data if any(name != "unit" for name, _ in node.data[1]) else None)


def same_quantity(a, b):
    """A unit in one of the two is no reason for wrong, a different unit is; 100 cm = 1 m, 50% = 0.5 = 50, 90 deg = pi/2."""
    (x, ua), (y, ub) = split_unit(a), split_unit(b)
    if ua and ub:
        return ua[1] == ub[1] and same_expr(
            x if ua[0] == ub[0] else times(num(ua[0] / ub[0]), x), y
        )
    if ub:
        x, y, ua = y, x, ub
    if ua == PERCENT and same_expr(times(num(Fraction(1, 100)), x), y):
        return True
    if ua == DEGREE and (contains(y, "c", "pi") or any(contains(y, "f", f) for f in _MATH_NAME)):
        x = Node("/", None, (times(x, Node("c", "pi")), num(180)))
    return same_expr(x, y)


# ---- 4. names and equations ------------------------------------------------------------------------------------------
def heading(side, others):
    """The name that one side gives to the others: x, f(x), f^{-1}(x), (x, y), |AB|, sin A, P(A > B); else None."""
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
    return head if head and not any(head in variables(p) for p in others) else None


def unname(node):
    """`x = 5` -> ("x", 5), `f(x) = x+1` -> ("f", x+1), `A(2, 3)` -> ("A", (2, 3)), `x in S` -> ("x", S), others ->
    ("", node). In a chain of equal numbers any stands for all; 6 = 5 is no number, 10/3 ~ 3.33 is one if it rounds so."""
    if (
        node.tag == "*"
        and len(node.kids) == 2
        and node.kids[0].tag == "v"
        and node.kids[1].tag == "seq"
    ):
        return node.kids[0].data, node.kids[1]
    if node.tag != "rel" or not set(node.data) <= {"=", "~", "in"}:
        return "", node
    parts, ops, name = node.kids, node.data, ""
    while len(parts) > 1 and (head := heading(parts[0], parts[1:])):  # AB = CD = 6
        name, parts, ops = name or head, parts[1:], ops[1:]
    if not name and ops == ("=",) and (head := heading(parts[1], parts[:1])):  # 6 = x
        name, parts, ops = head, parts[:1], ()
    if "in" in ops or (not name and any(map(variables, parts))):
        return "", node
    parts = [p for p in parts if not variables(p)] or parts  # AOB = 2 ACB = 80
    for p, q, op in zip(parts, parts[1:], ops):
        if not (same_quantity(p, q) or (op == "~" and rounds_to(p, q))):
            return "", node
    return name, parts[0]


def rounds_to(p, q):
    """Is q a decimal that p rounds to?"""
    p, q = split_unit(p)[0], split_unit(q)[0]
    u = resolution(q)
    return u is not None and abs(value(p) - value(q)) <= u / 2 * 1.000001


_FLIP = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def same_relation(a, b):
    """Two equations or inequalities: left minus right agree up to a factor (a positive one for inequalities)."""
    if len(a.kids) != 2 or len(b.kids) != 2:
        return len(a.kids) == len(b.kids) and a.data == b.data and all(map(same, a.kids, b.kids))
    sides = []
    for node in (a, b):
        (left, right), op = node.kids, node.data[0]
        left, right, op = (right, left, _FLIP[op]) if op[0] == ">" else (left, right, op)
        sides.append((op, Node("+", None, (left, negate(right)))))
    (op, p), (op_b, q) = sides
    if op != op_b or op == "in":
        return False
    pairs = list(samples(p, q, variables(a) | variables(b)))
    if any((abs(x) < 1e-9) != (abs(y) < 1e-9) for x, y in pairs):
        return False
    ratios = [x / y for x, y in pairs if abs(y) >= 1e-9]
    return (
        len(ratios) >= 3
        and all(close(r, ratios[0]) for r in ratios)
        and (op in ("=", "~", "!=") or ratios[0] > 0)
    )


# ---- 5. sets of reals: lists of (low, closed, high, closed) ----------------------------------------------------------
INF = Node("c", "inf")
MINUS_INF = negate(INF)
REALS = Node("w", "reals")


def outside(low, high, closed=False):
    """All reals below low and above high."""
    return [(MINUS_INF, False, low, closed), (high, closed, INF, False)]


def intervals(node):
    """A set of reals as a list of intervals from left to right, else None."""
    if node == REALS:
        return [(MINUS_INF, False, INF, False)]
    if node.tag == "seq":
        opener, closer, word = node.data
        if opener in ("(", "[") and len(node.kids) == 2:
            return [(node.kids[0], opener == "[", node.kids[1], closer == "]")]
        if opener or not word:
            return None
        return (
            joined(node.kids)
            if word == "or"
            else overlap(node.kids)
            if all(k.tag == "rel" for k in node.kids)
            else None
        )
    if node.tag == "set":
        left, right = node.kids
        if (
            node.data == "\\setminus"
            and left == REALS
            and right.tag == "seq"
            and len(right.kids) == 1
        ):
            return outside(right.kids[0], right.kids[0])
        return (
            joined(node.kids)
            if node.data == "\\cup"
            else overlap(node.kids)
            if node.data == "\\cap"
            else None
        )
    return of_relation(node) if node.tag == "rel" else None


def joined(nodes):
    parts = [intervals(k) for k in nodes]
    return (
        None
        if None in parts
        else sorted(sum(parts, []), key=lambda p: -math.inf if infinite(p[0]) else value(p[0]))
    )


def overlap(nodes):
    """x > 1 and x < 3: two rays"""
    parts = [intervals(k) for k in nodes]
    if len(parts) != 2 or not all(p and len(p) == 1 for p in parts):
        return None
    a, b = sorted((p[0] for p in parts), key=lambda p: infinite(p[0]) < 0)
    return [a[:2] + b[2:]] if infinite(a[2]) and infinite(b[0]) else None


def of_relation(node):
    """Intervals of x > 5, 1 < x <= 3, |x| < 2, x != 0, x in S."""
    kids, ops = node.kids, node.data
    if ops == ("in",):
        return intervals(kids[1])
    closed = len(ops[0]) == 2
    if (
        kids[0].tag == "f"
        and kids[0].data == "abs"
        and kids[0].kids[0].tag == "v"
        and len(ops) == 1
        and ops[0] in _FLIP
    ):
        low, high = negate(kids[1]), kids[1]
        return [(low, closed, high, closed)] if ops[0][0] == "<" else outside(low, high, closed)
    names = [k for k, p in enumerate(kids) if p.tag == "v"]
    if len(names) != 1 or sum(bool(variables(p)) for p in kids) != 1:
        return None
    at = names[0]
    if ops == ("!=",):
        return outside(kids[1 - at], kids[1 - at])
    if (
        not set(ops) <= set(_FLIP)
        or len(ops) > 2
        or (len(ops) == 2 and (at != 1 or ops[0][0] != ops[1][0]))
    ):
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
    ia, ib = intervals(a), intervals(b)
    if ia and ib:
        return len(ia) == len(ib) and all(
            p[1::2] == q[1::2] and same(p[0], q[0]) and same(p[2], q[2]) for p, q in zip(ia, ib)
        )
    if tags & {"set", "w"}:
        return a[:2] == b[:2] and a.tag == "set" and all(map(same, a.kids, b.kids))
    return False if "rel" in tags and not (several(a) and several(b)) else None


# ---- 6. lists, and the verdict ---------------------------------------------------------------------------------------
def same_ratio(a, b):
    """Rule for 1:2:3 = 2:4:6; two parts are a fraction."""
    if not a.tag == b.tag == "ratio":
        return None
    pairs = zip(a.kids, b.kids)
    return len(a.kids) == len(b.kids) and all(
        same_expr(times(p, b.kids[0]), times(q, a.kids[0])) for p, q in pairs
    )


def vector(node):
    """A matrix of one row or one column as a tuple."""
    if node.data[2] == "matrix" and (
        len(node.kids) == 1 or all(len(r.kids) == 1 for r in node.kids)
    ):
        return Node("seq", ("(", ")", ""), tuple(cell for row in node.kids for cell in row.kids))
    return node


def same_ordered(a, b):
    """Rule for points, vectors, matrices; x = 1, y = 2 is the point (1, 2), x = 1, x = 2 is none."""
    if not a.tag == b.tag == "seq":
        return None
    if (a.data[2] == "matrix") != (b.data[2] == "matrix"):
        a, b = vector(a), vector(b)
    (open_a, close_a, word_a), (open_b, close_b, word_b) = a.data, b.data
    if not ("(" in (open_a, open_b) or open_a == open_b == "["):
        return None
    half_open = [o + c in ("(]", "[)") for o, c in (a.data[:2], b.data[:2])]
    if (
        len(a.kids) != len(b.kids)
        or "{" in (open_a, open_b)
        or "or" in (word_a, word_b)
        or half_open[0] != half_open[1]
    ):
        return False
    if open_a and open_b and len(a.kids) == 2 and (open_a, close_a) != (open_b, close_b):
        return False
    members = []
    for seq in (a, b):
        names = [unname(k)[0] for k in seq.kids]
        if all(names) and len(set(names)) < len(names):
            return False
        order = (
            sorted(range(len(names)), key=names.__getitem__) if all(names) else range(len(names))
        )
        members.append([seq.kids[k] for k in order])
    return all(map(same, *members))


def several(node):
    """The members of a list, a set or a plus-minus, else None."""
    if node.tag == "seq" and node.data[0] in ("", "{"):
        return [m for k in node.kids for m in (several(k) if contains(k, "pm") else None) or [k]]
    return (
        [choose_sign(node, 1), choose_sign(node, -1)]
        if node.tag != "seq" and contains(node, "pm")
        else None
    )


def choose_sign(node, sign):
    """Reads every plus-minus as plus (sign 1) or minus (sign -1); minus-plus the other way round."""
    kids = tuple(choose_sign(k, sign) for k in node.kids)
    if node.tag == "pm":
        return kids[0] if sign * node.data > 0 else negate(kids[0])
    return node._replace(kids=kids)


def same_unordered(a, b):
    """Rule for lists and sets: the same members in any order; in a set, {2, 2} is {2}."""
    ma, mb = members(a, b), members(b, a)
    if ma is None and mb is None:
        return None
    ma, mb = ma or [a], mb or [b]
    if max(len(ma), len(mb)) > 60:
        return False
    lists = [n for n in (a, b) if n.tag == "seq"]
    if not lists or any(n.data[0] == "{" or n.data[2] == "or" for n in lists):
        ma, mb = (
            [x for k, x in enumerate(m) if not any(same(x, y) for y in m[:k])] for m in (ma, mb)
        )
    if len(ma) != len(mb) or (ma[0] is a and mb[0] is b):
        return False
    for x in ma:
        k = next((k for k, y in enumerate(mb) if same(x, y)), None)
        if k is None:
            return False
        mb = mb[:k] + mb[k + 1 :]
    return True


def members(node, other):
    """several(), and [2003, 2004] against a bare list."""
    bare = other.tag == "seq" and not other.data[0] and other.data[2] != "or"
    return (
        list(node.kids)
        if bare and node.tag == "seq" and node.data[:2] == ("[", "]")
        else several(node)
    )


def without_integer_note(node):
    """x = pi/4 + k pi, k in Z -> x = pi/4 + k pi"""
    if node.tag != "seq" or node.data[0]:
        return node
    left = [
        k
        for k in node.kids
        if not (
            k.tag == "rel" and k.data == ("in",) and k.kids[1].tag == "w" and k.kids[1] != REALS
        )
    ]
    return left[0] if len(left) == 1 < len(node.kids) else node


def same(a, b):
    """Do two trees mean the same answer? Names first (x = 5 against 5), then the first rule that applies."""
    if a == b:
        return True
    a, b = without_integer_note(a), without_integer_note(b)
    (name_a, x), (name_b, y) = unname(a), unname(b)
    relations = a.tag == b.tag == "rel"
    if "rel" in (x.tag, y.tag):
        if relations and not (intervals(a) and intervals(b)):
            return same_relation(a, b)
    elif name_a or name_b:
        function = (
            {name_a, name_b} & set("fgh") and variables(x) and variables(y)
        )  # f(x) = x^2 is y = x^2
        labels = max(len(name_a), len(name_b)) > 3  # Area = 5 and Surface = 5
        compatible = name_a == name_b or not (name_a and name_b) or labels or function
        return (compatible and same(x, y)) or (relations and same_relation(a, b))
    for rule in (same_ratio, same_region, same_ordered, same_unordered):
        if (verdict := rule(x, y)) is not None:
            return verdict
    return "seq" not in (x.tag, y.tag) and same_quantity(x, y)
