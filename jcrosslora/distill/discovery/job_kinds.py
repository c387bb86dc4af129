"""Kinds of jobs that models are often trained for, each with instructions, and inputs with answers."""

from __future__ import annotations

from dataclasses import dataclass

from jcrosslora.distill.discovery.notations import write_in, write_plain


@dataclass(frozen=True)
class JobKind:
    """A kind of job.

    Attributes:
        name: what reports call it.
        instructions: what may stand in front of an input, with what lies between; "" is nothing.
        examples: inputs of one form, each a single line, with the answers that they could get.
        records: whether inputs are records of facts, which requests have in several notations in turn.
    """

    name: str
    instructions: tuple[str, ...]
    examples: tuple[tuple[str, str], ...]
    records: bool = False

    @property
    def inputs(self) -> list[str]:
        """The inputs of the examples."""
        return [text for text, _ in self.examples]

    @property
    def requests(self) -> list[str]:
        """The requests of the examples, with the instructions in turn."""
        return [self.request(text, place) for place, text in enumerate(self.inputs)]

    def request(self, text: str, place: int) -> str:
        """Put one of the instructions in front of an input: they take turns."""
        return self.instructions[place % len(self.instructions)] + (write_in(text, place) if self.records else text)

    def input_of(self, request: str) -> str:
        """Return the input of a request of this kind."""
        known = sorted(self.instructions, key=len, reverse=True)
        text = request.removeprefix(next(one for one in known if request.startswith(one)))
        return write_plain(text) if self.records else text


KINDS = (
    JobKind(
        "questions",
        ("", "Answer the question: ", "Answer in a few words.\n"),
        (
            ("What is the capital of Portugal?", "Lisbon"),
            ("Why does ice float on water?", "Ice is less dense than water."),
            ("Which planet is the largest?", "Jupiter"),
            ("How many legs does a spider have?", "eight"),
            ("Who wrote the play Hamlet?", "William Shakespeare"),
            ("What do plants need to grow?", "light, water and air"),
        ),
    ),
    JobKind(
        "labels of feeling",
        ("Is the review positive or negative?\n", "Sentiment of the text: ", "What does the writer feel?\n"),
        (
            ("The room was cold and nobody said sorry.", "negative"),
            ("I passed the exam, I can't believe it!", "positive"),
            ("The new phone is ok, I guess.", "neutral"),
            ("Best boots that I ever had, warm and light.", "positive"),
            ("They promised a call and never rang.", "negative"),
            ("A slow film with a lovely end.", "mixed"),
        ),
    ),
    JobKind(
        "labels of wishes",
        ("What does the person want?\n", "Name the topic of the message: ", "Classify the text: "),
        (
            ("My parcel should have been here on Monday, where is it?", "late delivery"),
            ("How do I get a new password for my account?", "reset password"),
            ("The printer on the second floor is broken again.", "technical support"),
            ("I would like to see a doctor next week.", "book appointment"),
            ("Can I bring my dog on the train?", "pets on board"),
            ("Please take me off your mailing list.", "unsubscribe"),
        ),
    ),
    JobKind(
        "text to JSON",
        ("Convert the text to JSON: ", "Write the request as a JSON call.\n", "Extract the fields as JSON.\n"),
        (
            ("I'd like two boxes of green tea by Friday.", '{"order": "green tea", "count": 2, "day": "Friday"}'),
            ("Turn the heating in the hall up to 22 degrees.", '{"call": "SetHeating", "room": "hall", "to": 22}'),
            ("Anna Keller, who is a nurse, was born in 1990.", '{"name": "Anna Keller", "job": "nurse", "born": 1990}'),
            ("The chess club meets in room 12 at noon.", '{"event": "chess club", "room": "12", "time": "noon"}'),
            ("Send a card to my aunt in Leeds.", '{"call": "SendCard", "to": "aunt", "city": "Leeds"}'),
            ("Find me a cheap flight to Oslo in June.", '{"search": "flight", "to": "Oslo", "month": "June"}'),
        ),
    ),
    JobKind(
        "data to text",
        ("Write a sentence from the data: ", "Describe it in one or two sentences.\n", "Put the facts into words.\n"),
        (
            ("name: Polar Lamp, kind: lamp, colour: white, price: 30 euros", "The white Polar Lamp costs 30 euros."),
            (
                "name: Tom Reed, job: goalkeeper, team: Harbour City, age: 24",
                "Tom Reed, who is 24, keeps the goal of Harbour City.",
            ),
            ("name: Mount Elva, height: 2,914 metres, country: Norway", "Mount Elva in Norway is 2,914 metres high."),
            (
                "name: Red Sand, kind: novel, author: Mia Holt, year: 1987",
                "Red Sand is a novel by Mia Holt that appeared in 1987.",
            ),
            (
                "name: Bergen, sky: rain, wind: strong, high: 9 degrees",
                "In Bergen it rains with a strong wind and at most 9 degrees.",
            ),
            (
                "name: Lindo, kind: folding bicycle, weight: 11 kg, gears: 8",
                "The Lindo is a folding bicycle of 11 kg with 8 gears.",
            ),
        ),
        records=True,
    ),
    JobKind(
        "extraction",
        ("Which names does the text have?\n", "List the things in the text: ", "Extract the keywords: "),
        (
            ("Cook the oats in milk and add honey.", "oats, milk, honey"),
            ("Laura met Dr. Stein at the station.", "Laura; Dr. Stein"),
            ("From Rome she took the night train to Vienna.", "Rome, Vienna"),
            ("Bees need flowers all summer to make honey.", "bees, flowers, honey"),
            ("We will see you on 4 May at the office.", "4 May"),
            ("Pack a torch, a knife and two maps.", "torch, knife, maps"),
        ),
    ),
    JobKind(
        "translation",
        ("Translate to French: ", "Translate the sentence to German.\n", "How do you say in Spanish: "),
        (
            ("The cat is asleep on the chair.", "Le chat dort sur la chaise."),
            ("Where is the station?", "Où est la gare ?"),
            ("I would like a glass of water.", "Je voudrais un verre d'eau."),
            ("The shop opens at eight.", "Le magasin ouvre à huit heures."),
            ("We have not seen him today.", "Nous ne l'avons pas vu aujourd'hui."),
            ("My sister lives by the sea.", "Ma soeur vit au bord de la mer."),
        ),
    ),
    JobKind(
        "summaries",
        ("Summarise: ", "Write a headline for the text.\n", "Sum up in one sentence: "),
        (
            (
                "The city says that repairs of the bridge will take until May, longer than was planned.",
                "The bridge stays closed until May.",
            ),
            (
                "After three dry years the lake is full again, the park service says, and boats are back.",
                "The lake is full again.",
            ),
            (
                "Ben wanted to cook, but there was no gas, so he went to his sister and ate there.",
                "Ben ate at his sister's.",
            ),
            (
                "Hi all, the meeting on Thursday has to move to Friday, same time and same room.",
                "The meeting moves to Friday.",
            ),
            (
                "Many of the houses in the old town need new roofs, and there is no money for them.",
                "Roofs in the old town are in need of money.",
            ),
            (
                "The team lost its first four games, but with a new coach it won all the others.",
                "A new coach turned the season.",
            ),
        ),
    ),
    JobKind(
        "rewriting",
        ("Correct the sentence: ", "Write it more politely.\n", "Say it in other words: "),
        (
            ("She go to school yesterday.", "She went to school yesterday."),
            ("Send me the report.", "Could you please send me the report?"),
            ("The film was boring.", "The film did not hold my attention."),
            ("He don't like the tea.", "He does not like the tea."),
            ("Move your car now.", "Would you mind moving your car?"),
            ("We was late for the bus.", "We were late for the bus."),
        ),
    ),
    JobKind(
        "code",
        ("Write a function in Python: ", "Write it in code.\n", "Write the SQL query: "),
        (
            ("Double a number.", "def double(x): return 2 * x"),
            ("Count the words of a text.", "def count(text): return len(text.split())"),
            ("List all users that are older than 30.", "SELECT name FROM users WHERE age > 30;"),
            ("Add up a list of numbers.", "def total(numbers): return sum(numbers)"),
            ("Find the longest line of a file.", "def longest(path): return max(open(path), key=len)"),
            ("Sort the orders by their date.", "SELECT * FROM orders ORDER BY date;"),
        ),
    ),
    JobKind(
        "arithmetic",
        ("", "Solve the problem: ", "Work it out step by step.\n"),
        (
            ("Mia has 3 pens and buys 4 more. How many pens does she have?", "3 + 4 = 7. She has 7 pens."),
            ("A train goes 60 km in an hour. How far does it go in three hours?", "3 * 60 = 180. It goes 180 km."),
            ("A coat of 80 euros is a quarter cheaper today. What does it cost?", "80 - 20 = 60. It costs 60 euros."),
            ("Four friends share 20 sweets. How many does each one get?", "20 / 4 = 5. Each gets 5 sweets."),
            ("A box holds 12 eggs. How many eggs are in 5 boxes?", "5 * 12 = 60. There are 60 eggs."),
            ("Tom is 9 and his brother is 4 years older. How old is he?", "9 + 4 = 13. He is 13."),
        ),
    ),
    JobKind(
        "conversation",
        ("",),
        (
            ("Hi, how are you today?", "I'm well, thank you. What can I do for you?"),
            ("Write a short story about a lost key.", "Old Sam looked for his key all day. It was in the door."),
            ("Give me a tip for better sleep.", "Go to bed at the same time each day."),
            ("I'm bored, what shall I do?", "How about a walk? The sun is out."),
            ("Tell me a joke.", "Why did the book go to the doctor? It had a bad spine."),
            ("How do I clean a wooden table?", "Wipe it with a damp cloth, and rub in a little oil."),
        ),
    ),
)
