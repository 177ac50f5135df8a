"""Units of measure and currencies in their spellings, and words that are none.

No unit is converted into another: 12 cm and 0.12 m are different answers.
"""

from __future__ import annotations

import re

_UNIT_NAMES = {
    "%": "% percent percents percentage percentages pct percentagepoint percentagepoints",
    "°": "° degree degrees deg 度",
    "°c": "°c c degreec degreesc degreecelsius degreescelsius celsius 摄氏度",
    "°f": "°f f degreef degreesf degreefahrenheit degreesfahrenheit fahrenheit 华氏度",
    "$": "$ usd dollar dollars us$ usdollar usdollars 美元",
    "€": "€ eur euro euros 欧元",
    "£": "£ gbp pound pounds 英镑",
    "¥": "¥ cny rmb yuan 元 块 块钱 人民币",
    "₹": "₹ inr rs rupee rupees 卢比",
    "¢": "¢ cent cents",
    "mm": "mm millimeter millimeters millimetre millimetres 毫米",
    "cm": "cm cms centimeter centimeters centimetre centimetres 厘米",
    "dm": "dm decimeter decimeters decimetre decimetres 分米",
    "m": "m meter meters metre metres 米",
    "km": "km kms kilometer kilometers kilometre kilometres 千米 公里",
    "in": "in inch inches 英寸",
    "ft": "ft foot feet 英尺",
    "yd": "yd yard yards",
    "mi": "mi mile miles 英里",
    "mg": "mg milligram milligrams 毫克",
    "g": "g gram grams 克",
    "kg": "kg kgs kilogram kilograms 千克 公斤",
    "t": "t ton tons tonne tonnes 吨",
    "lb": "lb lbs",
    "oz": "oz ounce ounces",
    "ml": "ml milliliter milliliters millilitre millilitres 毫升",
    "l": "l liter liters litre litres 升",
    "ms": "ms millisecond milliseconds 毫秒",
    "s": "s sec secs second seconds 秒 秒钟",
    "min": "min mins minute minutes 分 分钟",
    "h": "h hr hrs hour hours 小时",
    "day": "day days 天 日",
    "week": "week weeks 周",
    "month": "month months 个月",
    "year": "year years yr yrs yearold yearsold 年 岁",
    "mm2": "mm2 mm^2 sqmm squaremillimeters squaremillimetres 平方毫米",
    "cm2": "cm2 cm^2 sqcm squarecm squarecentimeters squarecentimetres 平方厘米",
    "m2": "m2 m^2 sqm squarem squaremeters squaremetres 平方米",
    "km2": "km2 km^2 sqkm squarekm squarekilometers squarekilometres 平方公里 平方千米",
    "in2": "in2 in^2 sqin squarein squareinches",
    "ft2": "ft2 ft^2 sqft squareft squarefeet",
    "unit2": "unit2 unit^2 units2 units^2 squareunit squareunits sq.units squnits",
    "unit": "unit units 单位",
    "mm3": "mm3 mm^3",
    "cm3": "cm3 cm^3 cubiccm cubiccentimeters cubiccentimetres 立方厘米",
    "m3": "m3 m^3 cubicm cubicmeters cubicmetres 立方米",
    "unit3": "unit3 unit^3 units3 units^3 cubicunit cubicunits",
    "m/s": "m/s ms^-1 meterspersecond metrespersecond 米/秒",
    "m/s2": "m/s2 m/s^2 ms^-2",
    "km/h": "km/h kmh kph km/hr kilometersperhour kilometresperhour 千米/时 公里/小时",
    "mph": "mph milesperhour",
    "k": "k kelvin kelvins",
    "n": "n newton newtons",
    "j": "j joule joules",
    "kj": "kj kilojoule kilojoules",
    "w": "w watt watts",
    "kw": "kw kilowatt kilowatts",
    "kwh": "kwh",
    "v": "v volt volts",
    "a": "a amp amps ampere amperes",
    "ω": "ω ohm ohms",
    "hz": "hz hertz",
    "pa": "pa pascal pascals",
    "mol": "mol mole moles",
    "rad": "rad rads radian radians",
    "people": "people person persons 人 个人",
    "个": "个",
}  # fmt: skip
_ALONE = "kn nm um μm dl cl ha px pt kb mb gb tb db mw gw kv ma mv mj ev kpa mpa kcal cal rpm"
_UNITS = {name: unit for unit, names in _UNIT_NAMES.items() for name in names.split()}
_UNITS |= {name: name for name in _ALONE.split()}
CURRENCIES = {"$": "$", "us$": "$", "usd": "$", "€": "€", "eur": "€", "£": "£", "gbp": "£"} | {
    "¥": "¥", "cny": "¥", "rmb": "¥", "₹": "₹", "rs": "₹", "rs.": "₹", "inr": "₹",
    "rm": "rm",
}  # fmt: skip
# "5 or", "5 May", "5 million to": a word that makes something else of the number before it
_NO_UNIT_WORDS = """
    or and of in on at for with per to not but nor from than minus plus times by versus vs about
    maybe perhaps if because no none since is are was were isn wrong pi th st nd rd am pm ad bc ago
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
    hundred thousand million billion trillion dozen half third quarter
    january february march april may june july august september october november december
    jan feb mar apr jun jul aug sep sept oct nov dec
    或 或者 和 与 到 至 不 月 号 点 分之
"""
_NO_UNIT = frozenset(_NO_UNIT_WORDS.split())
_UNIT = re.compile(r"[°%$€£¥₹Ω]?[^\W\d_]+(?:/[^\W\d_]+)?(?:\^?[23])?|[°%$€£¥₹Ω]")
_CHINESE = re.compile(r"[\u4e00-\u9fff]{1,3}")
_CLASSIFIERS = frozenset("个只条张本人次辆名位件块头匹棵朵支把座家台层页篇种类岁")


def read_unit(text: str, *, known_only: bool = False, classifier: bool = False) -> str | None:
    """The unit written as `text` ("" for none), or None when it is no unit.

    A word or two that the table does not know are a unit too ("9 apples"), unless known_only. One
    or two letters must be known: "3x" is no amount. classifier: after a Chinese numeral only known
    units and measure words ("三个"), for 一 begins many words.

    >>> read_unit("square cm"), read_unit("red apples"), read_unit("or ten")
    ('cm2', 'red apple', None)
    """
    if not text:
        return ""
    if text in "aMGSHTBD":  # "5a", "5G", "12D": a label, not amperes or grams
        return None
    if text in _UNITS:
        return _UNITS[text]
    words = text.casefold().rstrip(".").split()
    joined = "".join(words)
    for name in (joined, joined.replace("sq.", "sq")):
        if name in _UNITS:
            return _UNITS[name]
    if known_only or not 0 < len(words) <= 2 or not _NO_UNIT.isdisjoint(words):
        return None
    if len(joined) < 3 and not _CHINESE.fullmatch(joined):
        return None  # "3x", "2xy": a multiple of something
    if classifier and joined[0] not in _CLASSIFIERS:
        return None
    if _CHINESE.match(joined) and (joined[0] in "或和与到至不月号点" or len(joined) > 3):
        return None
    if not all(_UNIT.fullmatch(word) for word in words):
        return None
    return " ".join(words).removesuffix("s")


def units_differ(one: str, other: str) -> bool:
    """Whether two units contradict each other; a missing one does not, nor "°" beside "°C"."""
    if not one or not other or one == other or "unit" in (one, other):
        return False
    return not (one[0] == "°" == other[0] and "°" in (one, other))
