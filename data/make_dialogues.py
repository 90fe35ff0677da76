"""Write data/dialogues: short everyday dialogues and their summaries, half of them English and half Korean.

A small task on which one sentence has to take what matters from several turns, in the manner of DialogSum: speakers
are #Person1# and #Person2#, and the summary is in the dialogue's language.

    {"dialogue": "#Person1#: How much is this lamp?\\n#Person2#: It's 24 dollars.\\n#Person1#: I'll take it.",
     "summary": "#Person1# buys a lamp for 24 dollars."}

Dialogues are put together from the scenes and words below. No summary, and so no dialogue, occurs in two files or
twice in one. The same seed gives the same bytes.

Run: python data/make_dialogues.py
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from string import Formatter
from typing import NamedTuple

SIZES = {"validation": 100, "test": 100, "train": 3000}


class Word(str):
    """A word of a template, with what its sound asks for: {food:a} is an omelette, {food:을/를} is 김밥을 or 만두를."""

    def __format__(self, spec: str) -> str:
        if not spec:
            return str(self)
        if spec == "a":
            return f"{'an' if self[0] in 'aeiou' else 'a'} {self}"
        after_consonant, after_vowel = spec.split("/")
        # Hangul syllables stand in Unicode by their final consonants, 28 in turn, and the first of them is none
        ends_in_vowel = (ord(self[-1]) - ord("가")) % 28 == 0
        return self + (after_vowel if ends_in_vowel else after_consonant)


class Scene(NamedTuple):
    """A kind of dialogue: its turns, the first by #Person1#, and its summary.

    `|` stands between the wordings of a turn, and an empty one leaves the turn out. {place} is a word of that kind,
    {place1} and {place2} are two different ones.
    """

    turns: list[str]
    summary: str


class Language(NamedTuple):
    """Scenes, and the words of each kind that they take."""

    scenes: list[Scene]
    words: dict[str, list[str]]


ENGLISH = Language(
    [
        Scene(
            [
                "Are you ready to order?|What would you like?|May I take your order?",
                "{food:a} and {drink:a}, please.|I'd like {food:a} and {drink:a}.",
                "That's {price} dollars.|Sure. {price} dollars, please.",
                "|Here you are.",
            ],
            "#Person2# orders {food:a} and {drink:a} for {price} dollars.",
        ),
        Scene(
            [
                "Are you ready to order?|What would you like?",
                "{food:a}, please.|I'd like {food:a}.",
                "And to drink?|Anything to drink?",
                "{drink:a}, please.|Yes, {drink:a}.",
                "That's {price} dollars.",
            ],
            "#Person2# orders {food:a} and {drink:a} for {price} dollars.",
        ),
        Scene(
            [
                "Hello, {food:a} and {drink:a}, please.|Hi, can I have {food:a} and {drink:a}?",
                "That's {price} dollars.|Sure. {price} dollars, please.",
                "|Here you are.",
            ],
            "#Person1# orders {food:a} and {drink:a} for {price} dollars.",
        ),
        Scene(
            [
                "Shall we meet on {day} at {hour}?|Are you free on {day} at {hour}?",
                "Yes. Let's meet at the {place}.|Sure, see you at the {place}.",
                "|Great!|See you there.",
            ],
            "#Person1# and #Person2# will meet at the {place} on {day} at {hour}.",
        ),
        Scene(
            [
                "Shall we meet at the {place} on {day} at {hour1}?|Can you be at the {place} on {day} at {hour1}?",
                "I'm busy then. How about {hour2}?|Could we make it {hour2}?",
                "All right.|Fine, see you then.",
            ],
            "#Person1# and #Person2# will meet at the {place} on {day} at {hour2}.",
        ),
        Scene(
            [
                "I can't find my {thing}.|Have you seen my {thing}?|I've lost my {thing}.",
                "It's {spot}.|I saw it {spot}.",
                "|Thank you!|Oh, thanks.",
            ],
            "#Person1# is looking for {thing:a}, and #Person2# says it is {spot}.",
        ),
        Scene(
            [
                "How much is this {item}?|What's the price of this {item}?",
                "It's {price} dollars.|{price} dollars.",
                "I'll take it.|OK, I'll buy it.",
            ],
            "#Person1# buys {item:a} for {price} dollars.",
        ),
        Scene(
            [
                "How much is this {item}?|What's the price of this {item}?",
                "It's {price} dollars.|{price} dollars.",
                "That's too expensive.|That's too much for me.",
            ],
            "#Person1# does not buy the {item} because {price} dollars is too much.",
        ),
        Scene(
            [
                "They say there will be {weather} on {day}.|I hear there will be {weather} on {day}.",
                "Then let's go to the {venue} instead of {outing}.|Let's visit the {venue} then instead of {outing}.",
                "|Good idea.|All right.",
            ],
            "Because of {weather} on {day}, #Person2# suggests the {venue} instead of {outing}.",
        ),
        Scene(
            [
                "Excuse me, where is the {place1}?|Excuse me, how do I get to the {place1}?",
                "Turn {side} at the {place2}.|Go straight and turn {side} at the {place2}.",
                "|Thank you.",
            ],
            "#Person2# tells #Person1# to turn {side} at the {place2} to get to the {place1}.",
        ),
        Scene(
            [
                "May I borrow your {tool}?|Could you lend me your {tool}?",
                "Sure, but I need it back by {day}.|Yes, if you return it by {day}.",
                "|Thanks!|No problem.",
            ],
            "#Person1# borrows {tool:a} from #Person2# and will return it by {day}.",
        ),
        Scene(
            [
                "May I borrow your {tool}?|Could you lend me your {tool}?",
                "Sorry, I need it on {day}.|I'm afraid I need it on {day}.",
                "|OK.|Never mind.",
            ],
            "#Person2# does not lend #Person1# the {tool} because #Person2# needs it on {day}.",
        ),
        Scene(
            [
                "When does the {vehicle} to {city} leave?|What time is the {vehicle} to {city}?",
                "At {hour}, from platform {number}.|It leaves at {hour} from platform {number}.",
                "|Thank you.",
            ],
            "The {vehicle} to {city} leaves at {hour} from platform {number}.",
        ),
        Scene(
            [
                "You don't look well.|What's the matter?|Are you all right?",
                "I've had {symptom:a} since {day}.",
                "You should {advice}.|Why don't you {advice}?",
                "|OK, I will.|You're right.",
            ],
            "#Person2# has had {symptom:a} since {day}, and #Person1# advises #Person2# to {advice}.",
        ),
        Scene(
            [
                "What shall we give {name} for her birthday?|It's {name}'s birthday soon. What shall we give her?",
                "How about {item:a}?|Let's give her {item:a}.",
                "Good idea.|Yes, she'll like that.",
            ],
            "#Person1# and #Person2# will give {name} {item:a} for her birthday.",
        ),
    ],
    {
        kind: words.split(", ")
        for kind, words in {
            "advice": "see a doctor, take some medicine, stay in bed, drink hot tea, go home early, rest for a while",
            "city": "Austin, Boston, Chicago, Dallas, Denver, Houston, Portland, Seattle",
            "day": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
            "drink": "coffee, cola, hot chocolate, iced tea, lemonade, milkshake, orange juice",
            "food": "bagel, burger, hot dog, omelette, pancake, pizza, salad, sandwich, steak",
            "hour": "two, three, four, five, six, seven, eight, nine, ten",
            "item": "backpack, blanket, clock, hat, lamp, mirror, scarf, teapot, umbrella, vase",
            "name": "Anna, Clara, Emma, Grace, Julia, Laura, Nina, Sarah",
            "number": "1, 2, 3, 4, 5, 6, 7, 8, 9",
            "outing": "camping, cycling, fishing, hiking, sailing, swimming",
            "place": "bank, hospital, library, market, museum, park, post office, school, station, theater",
            "price": ", ".join(map(str, range(11, 50))),
            "side": "left, right",
            "spot": "by the door, in the car, in the kitchen, on the shelf, on the sofa, under the bed, under the desk",
            "symptom": "backache, bad cold, cough, fever, headache, sore throat, stomachache, toothache",
            "thing": "camera, jacket, key, laptop, notebook, passport, phone, umbrella, wallet, watch",
            "tool": "bicycle, calculator, camera, charger, dictionary, guitar, hammer, ladder, laptop, tent, umbrella",
            "vehicle": "bus, train",
            "venue": "aquarium, bowling alley, cinema, gym, library, mall, museum, theater",
            "weather": "a storm, fog, rain, snow, strong wind",
        }.items()
    },
)
KOREAN = Language(
    [
        Scene(
            [
                "주문하시겠어요?|무엇을 드릴까요?",
                "{food} 하나랑 {drink} 한 잔 주세요.|{food:과/와} {drink} 주세요.",
                "{price}원입니다.|네, {price}원입니다.",
                "|여기 있습니다.",
            ],
            "#Person2#는 {food:과/와} {drink:을/를} {price}원에 주문한다.",
        ),
        Scene(
            [
                "주문하시겠어요?|무엇을 드릴까요?",
                "{food} 하나 주세요.",
                "음료도 드릴까요?|음료는요?",
                "{drink} 한 잔 주세요.|{drink:이요/요}.",
                "{price}원입니다.",
            ],
            "#Person2#는 {food:과/와} {drink:을/를} {price}원에 주문한다.",
        ),
        Scene(
            [
                "{food} 하나랑 {drink} 한 잔 주세요.|여기 {food:과/와} {drink} 주세요.",
                "{price}원입니다.|네, {price}원입니다.",
                "|여기 있습니다.",
            ],
            "#Person1#은 {food:과/와} {drink:을/를} {price}원에 주문한다.",
        ),
        Scene(
            [
                "{day} {hour} 시에 만날까?|{day} {hour} 시에 시간 있어?",
                "좋아, {place} 앞에서 보자.|응, {place} 앞에서 만나자.",
                "|그래.|그때 봐.",
            ],
            "#Person1#과 #Person2#는 {day} {hour} 시에 {place} 앞에서 만나기로 한다.",
        ),
        Scene(
            [
                "{day} {hour1} 시에 {place} 앞에서 볼까?|{day} {hour1} 시에 {place} 앞에서 만날까?",
                "그때는 바빠. {hour2} 시는 어때?|{hour2} 시에 보면 안 될까?",
                "그래, 좋아.|알았어, 그때 봐.",
            ],
            "#Person1#과 #Person2#는 {day} {hour2} 시에 {place} 앞에서 만나기로 한다.",
        ),
        Scene(
            [
                "내 {thing} 못 봤어?|{thing:을/를} 잃어버렸어.|내 {thing:이/가} 안 보여.",
                "{spot}에 있어.|{spot}에 있던데.",
                "|고마워.|아, 고마워!",
            ],
            "#Person1#은 {thing:을/를} 찾고 있고, #Person2#는 {spot}에 있다고 말한다.",
        ),
        Scene(
            [
                "이 {item} 얼마예요?|이 {item:은/는} 얼마인가요?",
                "{price}원이에요.|{price}원입니다.",
                "그럼 살게요.|좋아요, 주세요.",
            ],
            "#Person1#은 {item:을/를} {price}원에 산다.",
        ),
        Scene(
            [
                "이 {item} 얼마예요?|이 {item:은/는} 얼마인가요?",
                "{price}원이에요.|{price}원입니다.",
                "너무 비싸네요.|저한테는 너무 비싸요.",
            ],
            "#Person1#은 {price}원이 너무 비싸서 {item:을/를} 사지 않는다.",
        ),
        Scene(
            [
                "{day}에 {weather:이/가} 온대.|{day}에 {weather:이/가} 올 거래.",
                "그럼 {outing} 대신 {venue}에 가자.|{outing} 말고 {venue}에 가자.",
                "|좋은 생각이야.|그러자.",
            ],
            "#Person2#는 {day}에 {weather} 때문에 {outing} 대신 {venue}에 가자고 한다.",
        ),
        Scene(
            [
                "실례지만 {place1:이/가} 어디예요?|{place1}에 어떻게 가요?",
                "{place2}에서 {side}으로 도세요.|쭉 가다가 {place2}에서 {side}으로 도세요.",
                "|감사합니다.",
            ],
            "#Person2#는 #Person1#에게 {place1}에 가려면 {place2}에서 {side}으로 돌라고 알려 준다.",
        ),
        Scene(
            [
                "{tool} 좀 빌려줄래?|{tool:을/를} 빌려도 될까?",
                "응, {day}까지 돌려줘.|그래, {day}까지 돌려주면 돼.",
                "|고마워.|그럴게.",
            ],
            "#Person1#은 #Person2#에게서 {tool:을/를} 빌리고 {day}까지 돌려주기로 한다.",
        ),
        Scene(
            [
                "{tool} 좀 빌려줄래?|{tool:을/를} 빌려도 될까?",
                "미안, {day}에 써야 해.|안 돼. {day}에 내가 써야 해.",
                "|알았어.|괜찮아.",
            ],
            "#Person2#는 {day}에 {tool:을/를} 써야 해서 #Person1#에게 빌려주지 않는다.",
        ),
        Scene(
            [
                "{city}행 {vehicle:은/는} 몇 시에 떠나요?|{city} 가는 {vehicle:이/가} 몇 시에 있어요?",
                "{hour} 시에 {number}번 승강장에서 떠나요.|{hour} 시에 {number}번 승강장에서 출발해요.",
                "|감사합니다.",
            ],
            "{city}행 {vehicle:은/는} {hour} 시에 {number}번 승강장에서 떠난다.",
        ),
        Scene(
            [
                "안색이 안 좋네.|어디 아파?|무슨 일 있어?",
                "{day}부터 {part:이/가} 아파.",
                "{advice} 게 좋겠어.|그럼 {advice} 게 좋겠어.",
                "|알았어.|그럴게.",
            ],
            "#Person2#는 {day}부터 {part:이/가} 아프고, #Person1#은 {advice} 게 좋겠다고 말한다.",
        ),
        Scene(
            [
                "{name} 씨 생일에 뭘 줄까요?|곧 {name} 씨 생일이에요. 뭘 줄까요?",
                "{item:은/는} 어때요?|{item:이/가} 좋겠어요.",
                "좋은 생각이에요.|네, 좋아할 거예요.",
            ],
            "#Person1#과 #Person2#는 {name} 씨 생일에 {item:을/를} 주기로 한다.",
        ),
    ],
    {
        kind: words.split(", ")
        for kind, words in {
            "advice": "물을 많이 마시는, 병원에 가는, 약을 먹는, 운동을 쉬는, 일찍 자는, 집에서 쉬는",
            "city": "강릉, 경주, 광주, 대구, 대전, 부산, 속초, 여수, 전주, 춘천",
            "day": "월요일, 화요일, 수요일, 목요일, 금요일, 토요일, 일요일",
            "drink": "녹차, 사이다, 식혜, 우유, 주스, 커피, 콜라, 홍삼차",
            "food": "김밥, 냉면, 떡볶이, 라면, 만두, 비빔밥, 샌드위치, 칼국수, 튀김",
            "hour": "두, 세, 네, 다섯, 여섯, 일곱, 여덟, 아홉, 열",
            "item": "가방, 거울, 꽃병, 담요, 모자, 목도리, 셔츠, 시계, 우산, 인형",
            "name": "김민수, 김지영, 박영호, 박은지, 이수진, 이현우, 최준호, 최하늘",
            "number": "1, 2, 3, 4, 5, 6, 7, 8, 9",
            "outing": "낚시, 등산, 산책, 소풍, 수영, 캠핑",
            "part": "눈, 다리, 머리, 목, 무릎, 배, 어깨, 이, 허리",
            "place": "공원, 극장, 기차역, 도서관, 박물관, 병원, 시장, 우체국, 은행, 학교",
            "price": ", ".join(map(str, range(3000, 20000, 500))),
            "side": "오른쪽, 왼쪽",
            "spot": "거실, 문 옆, 부엌, 서랍 안, 선반 위, 소파 위, 의자 뒤, 차 안, 책상 밑, 침대 밑",
            "thing": "가방, 공책, 모자, 시계, 안경, 여권, 열쇠, 우산, 지갑, 카메라, 휴대폰",
            "tool": "계산기, 기타, 노트북, 망치, 사다리, 사전, 우산, 자전거, 충전기, 카메라, 텐트",
            "vehicle": "기차, 버스",
            "venue": "도서관, 미술관, 박물관, 백화점, 수족관, 영화관, 찻집, 체육관",
            "weather": "눈, 비, 소나기, 태풍",
        }.items()
    },
)


def row(language: Language, rng: random.Random) -> dict[str, str]:
    """Fill one of the scenes with words."""
    scene = rng.choice(language.scenes)
    turns = [rng.choice(turn.split("|")) for turn in scene.turns]
    words: dict[str, Word] = {}
    for _, slot, _, _ in Formatter().parse(" ".join([scene.summary, *scene.turns])):
        if slot and slot not in words:
            kind = language.words[slot.rstrip("12")]
            words[slot] = Word(rng.choice([word for word in kind if word not in words.values()]))
    said = [capitalised(turn.format(**words)) for turn in turns if turn]
    dialogue = "\n".join(f"#Person{1 + i % 2}#: {turn}" for i, turn in enumerate(said))
    return {"dialogue": dialogue, "summary": scene.summary.format(**words)}


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def distinct_rows(rng: random.Random) -> Iterator[dict[str, str]]:
    """Rows in English and Korean by turns, each with a summary of its own."""
    seen: set[str] = set()
    for language in cycle((ENGLISH, KOREAN)):
        made = row(language, rng)
        while made["summary"] in seen:
            made = row(language, rng)
        seen.add(made["summary"])
        yield made


def main() -> int:
    parser = argparse.ArgumentParser(description="Write short dialogues and their summaries as JSONL files.")
    default = Path(__file__).resolve().parent / "dialogues"
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: dialogues beside this)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the dialogues drawn (default: %(default)s)")
    args = parser.parse_args()

    rows = distinct_rows(random.Random(args.seed))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, size in SIZES.items():
            lines = [json.dumps(next(rows), ensure_ascii=False) + "\n" for _ in range(size)]
            (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    except OSError as error:
        print(f"error: cannot write {args.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: " + ", ".join(f"{size} {name}" for name, size in SIZES.items()) + " rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
