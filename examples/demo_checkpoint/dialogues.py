"""Written dialogues: questions and answers, numbers, dates, names.

A template is the turns of a dialogue. `{slot}` is a word from a list or a number, the same in all
turns; `{slot2}` is another draw of the same kind.
"""

import random
import re
import string

from spelling import DRAWS, TextForms

WORDS = {
    "name": """Anna Peter Maria John Lucy David Emma Thomas Alice Robert Sarah Michael Laura Daniel
        Julia William Grace Henry Sophie George Hannah Samuel Olivia Benjamin Charlotte Edward
        Rachel Frank Nora Victor Helen Oscar Irene Simon Martha Philip Clara Vincent Diana Leo
        Catherine Anthony Rebecca Charles Elizabeth Joseph Patricia Kevin Monica Brian""",
    "surname": """Smith Johnson Brown Taylor Miller Wilson Anderson Clark Lewis Walker Hall Young
        King Wright Scott Green Baker Nelson Carter Mitchell Roberts Turner Phillips Campbell
        Parker Evans Edwards Collins Stewart Morris Murphy Cook Rogers Morgan Cooper Peterson""",
    "city": """London Paris Berlin Rome Boston Chicago Madrid Vienna Dublin Denver Seattle Toronto
        Sydney Houston Atlanta Phoenix Oslo Athens Cairo Tokyo Prague Lisbon Geneva Brussels
        Montreal Portland Memphis Dallas Detroit Oxford Cambridge Edinburgh Moscow Delhi Lima""",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "daytime": "morning afternoon evening",
    "colour": "red green blue white black yellow brown grey purple orange pink golden silver",
    "animal": """cat dog bird horse fish rabbit mouse goose sheep cow goat fox wolf bear lion tiger
        elephant monkey turtle frog squirrel pigeon donkey camel owl""",
    "thing": """book cup box chair bicycle umbrella lamp clock key bottle basket hammer camera
        telephone pencil jacket blanket mirror pillow suitcase guitar piano newspaper letter bag
        kettle ladder candle brush carpet wallet ticket picture spoon bucket shovel helmet""",
    "things": """books cups apples chairs boxes tickets bottles letters flowers eggs oranges stamps
        pictures pencils blankets windows potatoes sandwiches batteries envelopes shoes gloves""",
    "place": """house garden kitchen park school station library museum market hospital office
        church bridge harbour airport restaurant theatre forest river village factory bakery
        cellar attic garage bedroom hallway square castle farm""",
    "job": """teacher doctor farmer driver nurse baker lawyer painter engineer pilot cook writer
        singer carpenter soldier sailor judge student dentist gardener plumber actor""",
    "food": """bread cheese soup rice chicken fish salad pasta coffee tea milk juice chocolate cake
        butter honey fruit beef pepper sugar yoghurt mustard garlic""",
    "weather": "raining snowing sunny cloudy cold warm windy foggy stormy freezing",
    "adjective": """small large heavy light strange beautiful quiet noisy clean dirty expensive
        cheap useful broken ancient modern narrow wide soft hard bright dark empty full curious
        dangerous gentle familiar ordinary wonderful terrible""",
    "adverb": """slowly quickly carefully quietly suddenly finally usually probably certainly
        exactly almost hardly really simply clearly""",
    "language": "English French German Spanish Italian Russian Greek Chinese Japanese Arabic",
    "subject": """history music mathematics chemistry physics law medicine geography painting
        astronomy economics philosophy biology""",
    "relative": "mother father sister brother uncle aunt cousin daughter son grandmother neighbour",
}
WORDS = {slot: words.split() for slot, words in WORDS.items()}

TEMPLATES = [
    ["Hello, my name is {name}.", "Nice to meet you, {name}. I am {name2}."],
    ["Good {daytime}, how can I help you?", "I would like {count} {things}, please."],
    ["Good {daytime}, {name}. How are you?", "I am fine, thank you. And how are you?"],
    ["Where is the {colour} {thing}?", "It is in the {place}, next to the {thing2}."],
    ["What time is it?", "It is {time}.", "Already? Then we have to go!"],
    ["When does the train to {city} leave?", "At {time}, from platform {count}."],
    ["Do you live in {city}?", "No, I moved to {city2} in {year}."],
    ["What is your telephone number?", "It is {telephone}.", "Thank you. I will call on {day}."],
    ["How much is the {thing}?", "It costs {price}.", "That is too {adjective} for me."],
    ["When were you born?", "On {date}, {year}.", "And where was that?", "In {city}."],
    ["Is it {weather} in {city}?", "No, it is {weather2}, as it was on {day}."],
    ["What would you like to eat?", "Some {food} with {food2}, and a cup of tea."],
    ["Who is that?", "That is {name} {surname}, my {relative}.", "Is {name} a {job}?", "Yes."],
    ["Can you hear me?", "Yes, I can hear you very well.", "Wonderful! Let's begin."],
    ["Have you seen my {thing}?", "I think your {relative} took it to the {place}."],
    ["Why are you so late?", "I'm sorry, there was a {animal} on the road."],
    ["Which one do you want, the {colour} one or the {colour2} one?", "The {colour2} one."],
    ["How many {things} are there in the {place}?", "I counted {count} of them."],
    ["Did {name} call?", "Yes, at {time}. It was about the {adjective} {thing}."],
    ["Shall we meet on {day}?", "I can't, but {day2} at {time} would be fine."],
    ["What did the {job} say?", "That the {thing} is {adjective}, but still {adjective2}."],
    ["Do you speak {language}?", "Only a little, but my {relative} speaks it very well."],
    ["What are you reading?", "A {adjective} book about the {subject} of {city}."],
    ["How old is your {relative}?", "My {relative} will be {count} on {date}."],
    ["Could you open the window, please?", "Of course. It is {adverb} too warm in here."],
    ["How far is it to {city}?", "About {amount} miles, if you take the road by the {place}."],
    ["What happened to the {animal}?", "It {adverb} ran away when it saw the {animal2}."],
    ["May I ask you something?", "Please do. What would you like to know?"],
    ["Thank you very much for the {food}!", "You're welcome. Would you like some more?"],
    ["I don't understand this at all.", "Don't worry, I'll explain it once more."],
    ["See you on {day}, then.", "Goodbye, {name}, and give my best to your {relative}!"],
    ["The {colour} {animal} is in the {place}."],
    ["There are {count} {adjective} {things} on the table."],
    ["{name} {surname} was a {job} in {city} before {year}."],
    ["On {date}, {year}, about {amount} people came to the {place}."],
    ["The number is {telephone}, I repeat, {telephone}."],
    ["Prices rose by {percent} in {year}, and by {percent2} in {year2}."],
    ["Please call me back before {time} on {day} {daytime}."],
    ["My {relative} bought {count} {things} for {price} at the {place}."],
    ["{name} and {name2} are studying {subject} and {subject2} in {city}."],
    ["We walked {adverb} past the {place} and along the {adjective} river."],
    ["The {job} looked at the {thing}, shook his head, and said nothing."],
    ["I have never seen such a {adjective} {thing} in my whole life!"],
    ["If it is {weather} on {day}, we will stay at home and play cards."],
    ["She put the {food}, the {food2} and the {things} into a {adjective} bag."],
    ["Flight {count} to {city} will now board at gate {count2}."],
    ["In {year}, only {percent} of the {things} came from {city}."],
    ["Turn left at the {place}, then take the second street on the right."],
    ["The meeting on {date} has been moved to {day}, {time}."],
    ["What a {adjective} {daytime}! The {animal} is asleep, and so is the {relative}."],
    ["Ladies and gentlemen, welcome to {city}. The local time is {time}."],
    ["Every {day} {daytime}, the {job} takes the {colour} {thing} to the {place}."],
]

_SLOT = re.compile(r"(\D+)\d*")


def draw_dialogue(source: random.Random) -> list[TextForms]:
    """Draws the turns of a dialogue: one or more."""
    turns = source.choice(TEMPLATES)
    values = _draw_values(source, turns)
    written = {slot: value.written for slot, value in values.items()}
    spoken = {slot: value.spoken for slot, value in values.items()}
    return [TextForms(turn.format_map(written), turn.format_map(spoken)) for turn in turns]


def _draw_values(source: random.Random, turns: list[str]) -> dict[str, TextForms]:
    slots = {slot: None for turn in turns for _, slot, _, _ in string.Formatter().parse(turn)}
    slots.pop(None, None)
    values: dict[str, TextForms] = {}
    for slot in slots:
        value = _draw_value(source, slot)
        while value in values.values():
            value = _draw_value(source, slot)
        values[slot] = value
    return values


def _draw_value(source: random.Random, slot: str) -> TextForms:
    kind = _SLOT.fullmatch(slot)[1]
    if kind in DRAWS:
        return DRAWS[kind](source)
    word = source.choice(WORDS[kind])
    return TextForms(word, word)
