"""The same village, told in Chinese: fewer people, the same facts, shorter plots."""

from typing import NamedTuple

from minillm.data.stories.telling import Telling, fill
from minillm.data.stories.world import BY_NAME, Person

UNITS = "零一二三四五六七八九十"


class ChinesePerson(NamedTuple):
    name: str
    he: str
    job: str
    goods: str
    home: str
    pet: str
    food: str
    door: str
    english: Person

    def __str__(self) -> str:
        return self.name


PEOPLE = tuple(
    ChinesePerson(*row.split()[:-1], english=BY_NAME[row.split()[-1]])
    for row in """
米娅 她 面包师 面包 小桥 猫 李子 红 Mia
汤姆 他 铁匠 钉子 磨坊 猫头鹰 面条 蓝 Tom
阿本 他 陶匠 碗 教堂 狗 樱桃 黄 Ben
莉莉 她 裁缝 外套 池塘 乌龟 核桃 白 Lily
""".strip().splitlines()
)
THINGS = ("钥匙", "球", "勺子", "杯子", "地图", "镜子")
SPOTS = ("抽屉里", "床底下", "架子上", "门后面", "箱子里", "桌子上")
FRUIT = ("苹果", "梨", "鸡蛋", "李子")
DELAYS = (
    ("下了一夜的雨", "路上都是泥"),
    ("夜里下了霜", "路很滑"),
    ("下了三天的雪", "雪很深"),
    ("早上起了大雾", "看不清路"),
    ("夜里来了大风", "一棵树倒在路上"),
)
TOLD = {
    "home": ("{P}住在{P.home}边。", "{P}的家在{P.home}边。", "{P.home}边的房子是{P}的家。"),
    "job": ("{P}是村里的{P.job}。", "村里的{P.job}是{P}。", "大家都说{P}是最好的{P.job}。"),
    "goods": ("{P}卖{P.goods}。", "大家都去{P}那里买{P.goods}。", "{P}的店里有很多{P.goods}。"),
    "pet": ("{P}养了一只{P.pet}。", "{P}家的{P.pet}总跟着{P.he}。", "那只{P.pet}是{P}的。"),
    "food": ("{P}最爱吃{P.food}。", "{P}天天都想吃{P.food}。", "{P}觉得{P.food}最好吃。"),
    "door": ("{P}家的门是{P.door}色的。", "{P}家有一扇{P.door}色的门。"),
}
ONCE = ("一天早上，", "有一天，", "星期[一|二|三|四|五|六|天]，", "去年[春|夏|秋|冬]天，", "天快黑的时候，", "")


def numeral(number: int) -> str:
    """1 to 24 before a measure word: 一, 两, 十二, 二十."""
    if number == 2:
        return "两"
    tens, units = divmod(number, 10)
    return ("" if tens == 0 else "十" if tens == 1 else UNITS[tens] + "十") + (UNITS[units] if units else "")


def cast(t: Telling, *roles: str) -> list[ChinesePerson]:
    people = t.dice.sample(PEOPLE, len(roles))
    t.let(once=fill(t.dice, t.dice.pick(ONCE), {}), **dict(zip(roles, people)))
    return people


def about(t: Telling, person: ChinesePerson, k: int) -> None:
    t.let(P=person)
    for attribute in t.dice.sample(list(TOLD), k):
        t.say(*TOLD[attribute])


def portrait(t: Telling) -> None:
    (a,) = cast(t, "A")
    t.say("村里有[一个|一位]{A.job}，名叫{A}。", "你认识{A}吗？", "这是{A}的故事。")
    about(t, a, t.dice.number(3, 5))
    t.say("{A}[每天都|总是]很[快乐|高兴|忙]。", "{A.he}一边工作一边唱歌。")


def visitor(t: Telling) -> None:
    cast(t, "A")
    t.let(B=t.dice.pick(("客人", "孩子", "国王", "老人")))
    t.say("{once}{B}来到村里，遇见了{A}。", "{once}{A}带{B}看村子。")
    asked = (
        "“{P}住在哪里？”{B}问。“{P.home}边。”{A}说。",
        "“谁卖{P.goods}？”{B}问。“{P}。”{A}说。",
        "“{P}养了什么？”{B}问。“一只{P.pet}。”{A}说。",
        "“{P}爱吃什么？”{B}问。“{P.food}。”{A}说。",
        "“谁是{P.job}？”{B}问。“是{P}。”{A}说。",
    )
    for person in t.dice.sample(PEOPLE, 3):
        t.let(P=person)
        t.say(*asked)
    t.say("“谢谢你！”{B}说。", "{B}都记住了。")


def tidy(t: Telling) -> None:
    a, b, c = cast(t, "A", "B", "C")
    t.say("{once}{A}和{B}一起[打扫房子|收拾房间]。", "客人要来了，{A}和{B}一起打扫房子。")
    for person, thing, spot in zip((a, b), t.dice.sample(THINGS, 2), t.dice.sample(SPOTS, 2)):
        t.let(P=person, thing=thing, spot=spot)
        t.say("{P}把{thing}放在{spot}。")
        t.event("zh-put", person, thing, spot)
    about(t, c, 1)
    _, (who, thing, spot) = t.dice.pick(t.events)
    t.let(P=who, thing=thing, spot=spot)
    t.say("后来{C}问：“{thing}在哪里？”{P}说：“在{spot}。”", "{C}想要{thing}，在{spot}找到了。")


def late(t: Telling) -> None:
    a, b = cast(t, "A", "B")
    weather, state = t.dice.pick(DELAYS)
    t.let(weather=weather, state=state, place=t.dice.pick([person.home for person in PEOPLE]))
    t.say("{once}{A}要去{place}边见{B}。", "{A}和{B}说好在{place}边见面。")
    t.say("可是{weather}，{state}，{A}来晚了。", "因为{weather}，{state}，所以{A}来晚了。")
    about(t, t.dice.pick((a, b)), 1)
    t.say("“你怎么来晚了？”{B}问。“因为{state}。”{A}说。")
    t.say("{B}没有生气，他们一起吃了{B.food}。", "{B}笑了，他们一起[走了|回家了]。")


def counting(t: Telling) -> None:
    a, b = cast(t, "A", "B")
    total = t.dice.number(1, 20)
    change = t.dice.pick([k for k in range(-5, 6) if k and 1 <= total - k <= 20])
    t.let(fruit=t.dice.pick(FRUIT), n=numeral(total - change), k=numeral(abs(change)), m=numeral(total))
    t.say("{once}{A}有{n}个{fruit}。", "{once}{A}买了{n}个{fruit}。")
    if change > 0:
        t.say("{B}又给了{A.he}{k}个。", "后来{A.he}又找到{k}个。")
    else:
        t.say("{A.he}给了{B}{k}个。", "{B}吃了{k}个。")
    t.say("现在{A}有{m}个{fruit}。", "{A}数了数，一共{m}个。")
    about(t, t.dice.pick((a, b)), 1)


PLOTS = (portrait, visitor, tidy, late, counting)
