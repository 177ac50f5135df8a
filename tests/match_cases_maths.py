r"""Rows of the matcher of mathematics: (gold, prediction, score; None: cannot judge).

Where a row differs from `math_verify.verify(parse(gold), parse(prediction))` itself, the comment
says "mv:" and why.
"""

MATRIX = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"

MATH = [
    # numbers, decided without sympy
    ("3", "3", 1),
    ("3", "4", 0),
    ("70", "7", 0),
    ("-7", "7", 0),
    ("7", "7.0", 1),
    ("12", "+12", 1),
    ("0.5", "1/2", 1),
    (r"\frac{1}{2}", "0.5", 1),
    (r"\frac12", r"\dfrac{1}{2}", 1),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", 1),
    (r"1\frac12", "1.5", 1),
    ("1 1/2", "3/2", 1),  # mv: 1 * 1/2
    ("1/3", "0.33", 0),  # rounded is wrong below six decimals
    ("1/3", "0.3333", 0),
    ("1/3", "0.333333", 1),
    ("2/3", "0.666667", 1),
    ("2/3", "0.666666", 1),  # mv: cut is not rounded
    ("0", "0.0000001", 0),  # mv alone rounds both to six decimals
    ("0.1234567", "0.1234568", 0),
    ("1{,}234", "1234", 1),
    ("1,234", "1234", 1),
    ("1.5e3", "1500", 1),  # mv: 1.5 * e * 3
    (r"1.5\times10^3", "1500", 1),
    ("10^{-3}", "0.001", 1),
    (r"50\%", "0.5", 1),
    (r"50\%", "50", 1),
    (r"\frac{3}{4}", r"75\%", 1),
    (r"\$5", "5", 1),
    ("5", "five", 1),  # mv: f*i*v*e
    ("5", "15", 0),
    ("12", "1 2", 0),
    ("3", "1 2", 0),  # mv: 1 + 2
    ("$$3$$", "3", 1),
    (r"\boxed{3}", "3", 1),
    (r"$\frac{3}{4}$", "3/4", 1),
    # units and degrees
    (r"12\text{ cm}", "12", 1),
    (r"12\text{ cm}", "12 m", 0),  # mv takes every unit off
    (r"\sqrt{3}\text{ cm}", r"\sqrt{3}", 1),
    (r"\sqrt{3}\text{ cm}", r"\sqrt{3} cm", 1),
    (r"\sqrt{3}\text{ cm}", r"\sqrt{3} m", 0),  # mv: as above
    (r"24\pi \text{ cm}^2", r"24\pi", 1),
    (r"24\pi", r"24\pi cm^2", 1),  # mv: c * m^2
    ("5", "5 apples", 1),
    ("12m", "12", 0),  # mv: a unit; here m is a variable where it is joined
    ("12 m", "12", 1),
    ("2a", "2", 0),
    (r"30^\circ", "30", 1),
    (r"30^\circ", "30°", 1),
    ("30°", "30 degrees", 1),
    (r"30^\circ", r"\frac{\pi}{6}", 0),
    (r"\sin 30^\circ", "1/2", 1),  # mv: the sine of 30 radians
    (r"\angle A=30^\circ", "30", 1),
    # algebra
    (r"\frac{\sqrt3}{2}", r"\sqrt{3}/2", 1),
    (r"\frac{\sqrt3}{2}", "sqrt(3)/2", 1),
    (r"3\sqrt{2}", "3√2", 1),  # mv cannot read it
    (r"\sqrt{8}", r"2\sqrt{2}", 1),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", 1),
    (r"\sqrt{x+\sqrt{2}}", "sqrt(x+sqrt(2))", 1),
    (r"\sqrt2", "1.414214", 1),
    (r"\sqrt2", "1.41", 0),
    (r"\pi", "3.14", 0),
    (r"2\pi", "2pi", 1),  # mv: 2*p*i
    (r"2\pi", "2π", 1),
    ("(x+1)^2", "x^2+2x+1", 1),
    ("(x+1)^2", "x^2+1", 0),
    ("x^2-1", "(x-1)(x+1)", 1),
    ("a+b", "b+a", 1),
    ("a-b", "b-a", 0),
    (r"\frac{a}{b}", "a/b", 1),
    (r"\frac{x}{2}", "0.5x", 1),
    ("x^{10}", "x^10", 1),
    ("2^{10}", "1024", 1),
    ("2^{10}", "2**10", 1),  # mv cannot read it
    ("2^{3^2}", "2**3**2", 1),  # a tower is read from the right
    ("e^2", "exp(2)", 1),  # mv: e*x*p
    (r"\ln 2", "ln(2)", 1),
    (r"\log_2 8", "3", 1),
    (r"\tan\theta", "tan(theta)", 1),  # mv: t*a*n
    (r"\sin^2 x+\cos^2 x", "1", 1),
    ("|x|", "abs(x)", 1),
    ("5!", "120", 1),
    (r"\binom{5}{2}", "10", 1),
    ("3+4i", "4i+3", 1),
    ("24", "4!", 1),
    # equations
    ("3", "x=3", 1),
    ("x=3", "3", 1),
    ("x=3", "y=3", 0),
    ("4", "2+2=4", 1),
    ("2", "x^2=4", 0),
    ("y=2x+1", "2x+1", 1),
    ("y=2x+1", "y = 1+2x", 1),
    ("x^2+y^2=1", "2x^2+2y^2=2", 1),
    ("x=1, y=2", "y=2, x=1", 1),
    ("(x,y)=(1,2)", "(1,2)", 1),
    # several solutions
    (r"\{1,2\}", r"\{2,1\}", 1),
    (r"\{1,2\}", "x=1 or x=2", 1),
    ("x=1 or x=2", r"\{1,2\}", 1),
    ("x=1 or x=2", "x=2 或 x=1", 1),
    (r"\{1,2,3\}", "1, 2, 3", 1),
    (r"\{1,2,3\}", "{1,2}", 0),
    (r"x=\pm 2", r"\{2,-2\}", 1),
    (r"1\pm\sqrt2", r"1+\sqrt2, 1-\sqrt2", 1),
    ("2", r"\pm 2", 0),
    ("4", "3 or 4", 0),
    ("4", "3 and 4", 0),
    ("4", "3, 4", 0),
    ("9", r"9\text{ or }10", 0),
    ("x=2", "x=2 or x=-2", 0),
    (r"\emptyset", r"\{\}", 1),
    (r"\emptyset", "no solution", 1),
    ("no solution", "No real solutions", 1),
    ("no solution", "3", 0),
    # tuples, intervals, inequalities, matrices
    ("(1,2)", "(2,1)", 0),
    ("(1,2)", r"\left( 1, 2 \right)", 1),
    ("(0.5, 0.25)", "(1/2, 1/4)", 1),
    ("(1,2)", r"\{1,2\}", 0),  # mv: the two elements in order are enough
    ("{1,2}", "(2,1)", 0),  # mv: as above
    (r"\{1,2\}", r"\left\{2,1\right\}", 1),
    ("(1,2)", "[1,2]", 0),
    ("[1,2)", "[1, 2 )", 1),
    ("[1,2)", "(1,2]", 0),
    (r"(1,2)\cup(3,4)", r"(3,4)\cup(1,2)", 1),
    (r"x \le 3", r"(-\infty,3]", 1),
    (r"(-\infty,3]", r"x \le 3", 1),  # mv accepts an interval for an inequality, not this way
    ("x<3", "3>x", 1),
    ("x<3", r"x\le 3", 0),
    ("1<x<2", "(1,2)", 1),
    (r"\infty", "infinity", 1),
    (r"\mathbb{R}", "ℝ", 1),
    (MATRIX, MATRIX.replace("pmatrix", "bmatrix"), 1),
    (MATRIX, MATRIX.replace("3&4", "4&3"), 0),
    # ratios
    ("3:4", "3/4", 1),
    ("3:4", "6:8", 1),
    ("3:4", "4:3", 0),
    ("1:2:3", "2:4:6", 1),  # mv: 1/2/3
    ("1:2:3", "1/6", 0),
    # names and words
    (r"\text{Tuesday}", "tuesday", 1),
    ("even", "odd", 0),
    ("even", "neve", 0),  # mv: the product of the same letters
    ("ABC", "CBA", 0),  # mv: as above; an order, a name
    ("5", "The answer is 5", 1),
    (r"24\pi", r"The area is $24\pi$", 1),
    (r"24\pi", r"The area is not 24\pi", 0),
    ("5", "5 because the chart shows it", 0),
    ("x", "X", 1),  # math-verify's rule
    # what cannot be read
    ("3", "(", 0),
    ("3", r"\frac{", 0),
    ("3", "???", 0),
    ("3", "", 0),
    ("3", "x" * 2001, 0),
    ("x" * 2001, "$" + "x" * 2001 + "$", 1),  # equal texts need no sympy
    ("3" * 2001, "3", None),
    (r"\frac{", "3", None),
    (r"\frac{", r"\frac{", 1),
    ("???", "3", None),
    ("???", "???", 1),
    ("The cat sat on it, twice", "3", None),
    ("", "3", None),
    ("  ", "3", None),
]
