"""The layout of the demo page, and which button asks for what. Gradio is imported here alone.

    start(Page(models, place, folder), "127.0.0.1")     # the address of a page that is being served

A handler below gets what visitors gave and returns what is shown. What it computes stands in
demo_answers.py. `Page.on` makes a sentence of whatever goes wrong.
"""

import functools
import html
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from tools import demo_answers as answers
from tools import demo_pictures as pictures
from tools.demo_answers import TABS, Drawn, Models
from training.machine import Machine

CSS = """
.gradio-container {max-width: 1100px !important; margin: 0 auto !important}
.answers {width: 100%; border-collapse: collapse; font-size: .95em}
.answers th {text-align: left; font-weight: 600; opacity: .7}
.answers th, .answers td {padding: 4px 8px 4px 0; vertical-align: top}
.answers tr {border-bottom: 1px solid var(--border-color-primary)}
.answers small {opacity: .7; white-space: nowrap}
.share {display: inline-block; width: 40px; height: 8px; background: var(--border-color-primary)}
.share span {display: block; height: 8px; background: #0072B2}
.reads span {display: inline-block; padding: 1px 6px; margin: 2px; border-radius: 4px}
.reads .left {background: #0072B2; color: white}
.reads .right {background: #E69F00; color: black}
.reads .hidden {opacity: .5; text-decoration: line-through}
.reads .own {outline: 2px solid #D55E00}
.key {max-width: 300px}
.found img {object-fit: contain !important}
@media (max-width: 600px) {.share {display: none} .answers td {padding-right: 4px}}
"""
# How a word is coloured by its likelihood, from the largest down.
SURE, UNSURE, UNLIKELY = "over 50 %", "5 to 50 %", "under 5 %"
COLOURS = {SURE: "#56B4E9", UNSURE: "#F0E442", UNLIKELY: "#D55E00"}
# On a telephone the keyboard would begin every text with a capital, which the toy models never saw.
AS_TYPED = gr.InputHTMLAttributes(autocapitalize="off", autocorrect="off", spellcheck=False)
SHOWN = 20                              # pictures of a search, the best


def picture_box(label: str = "Picture") -> gr.Image:
    """A picture that reaches a handler as the file that was uploaded, whatever is in it."""
    box = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=320,
                   format="png")

    def path_of(payload) -> str | None:
        return payload.path if payload else None

    box.preprocess = path_of            # Gradio's own opens it, and fails on what is no picture
    return box


@dataclass
class Given:
    """The picture that goes along from tab to tab; `drawn` if it is a drawn scene."""
    path: str | None = None
    drawn: Drawn | None = None


class Page:
    """What all tabs share: the models, the folder of uploads, and how a handler is called."""

    def __init__(self, models: Models, place: Machine, folder: str):
        self.models, self.place, self.folder = models, place, folder

    def on(self, triggers, function: Callable, inputs=None, outputs=None):
        """Calls a handler at some events, one at a time in all; what goes wrong is a sentence."""
        @functools.wraps(function)
        def handler(*args):
            try:
                with self.place.autocast():
                    return function(*args)
            except (OSError, ValueError) as error:
                says = answers.sentence(error, self.folder)
            except Exception as error:      # a fault of this page: the visitor is told, too
                traceback.print_exc()
                says = (f"This went wrong inside ({type(error).__name__}); the terminal has more.")
            raise gr.Error(html.escape(says), duration=20, title="", print_exception=False)

        gr.on(triggers, handler, inputs, outputs, concurrency_id="model", concurrency_limit=1,
              show_progress="minimal", api_visibility="private")

    def model(self, tab: str, checkpoint: str):
        return self.models.able[tab][checkpoint]

    def choose_model(self, tab: str) -> gr.Dropdown:
        """A choice among the checkpoints that serve a tab; invisible where there is only one."""
        names = list(self.models.able[tab])
        return gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)

    def draw(self) -> Given:
        drawn = answers.draw_scene(self.folder, answers.new_seed())
        return Given(drawn.path, drawn)


def start(page: Page, host: str, port: int | None = None) -> str:
    """Serves a page in the background -> its address. ValueError for a port that is taken."""
    try:
        _, address, _ = build(page).launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
            inbrowser=False, run_history=False, footer_links=[], ssr_mode=False, css=CSS,
            enable_monitoring=False, max_file_size=f"{2 * answers.LARGEST}mb", show_error=True)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: nothing can be served there "
                         f"({answers.sentence(error)})") from None
    return address


def build(page: Page) -> gr.Blocks:
    """The page: a tab for everything that its models can do, and what is missing."""
    with gr.Blocks(title="What does it see?", analytics_enabled=False) as blocks:
        gr.Markdown("# What does it see?\nGive a model a picture and a text. Nothing that you "
                    "upload leaves the machine that serves this page.")
        given = gr.State(Given())
        with gr.Tabs():
            for name, make in MODEL_TABS.items():
                if page.models.able[name]:
                    with gr.Tab(name) as tab:
                        make(page, tab, given)
            with gr.Tab("Masks"):
                masks_tab(page)
        missing = answers.missing_tabs(page.models)
        if missing:
            gr.Markdown(missing)
        names = {name: None for able in page.models.able.values() for name in able}
        if names:
            gr.Markdown("Models: " + ", ".join(f"`{name}`" for name in names))
    return blocks


# -------------------------------------------------------------------------------------------------
# Tabs about one picture.

def one_picture(page: Page, tab, given: gr.State, texts: list, suggest: Callable):
    """The left column of a tab: a picture, a button that draws one, and what is true of it.

    texts: components that suggest(drawn) has values for, when a scene was drawn.
    Returns (picture, markdown of the facts). The picture of the last tab comes along.
    """
    picture = picture_box()
    button = gr.Button("Draw me a scene")
    known = gr.Markdown(render=False)

    def show(now: Given):
        """Picture, facts and texts of what is given; texts stay where nothing suggests others."""
        if now.drawn is None:
            return now, now.path, "", *[gr.skip() for _ in texts]
        about, *values = suggest(now.drawn)
        return now, now.path, about, *values

    outputs = [given, picture, known, *texts]

    def uploaded(path: str | None):
        return Given(path), ""

    page.on(button.click, lambda: show(page.draw()), None, outputs)
    page.on([picture.upload, picture.clear], uploaded, picture, [given, known])

    def arrive(now: Given, shown: str | None):
        if now.path is None:
            return show(page.draw())
        # Gradio keeps a drawn picture under a path of its own.
        drawn = bool(now.drawn and shown) and Path(shown).name == Path(now.path).name
        if shown == now.path or drawn:
            return [gr.skip() for _ in outputs]
        return show(now)

    page.on(tab.select, arrive, [given, picture], outputs)
    return picture, known


def fill_tab(page: Page, tab, given: gr.State):
    text = gr.Textbox(label="Text", value="a ___ square", render=False, html_attributes=AS_TYPED,
                      info="Underscores are a blank. There may be any number of blanks, or none.")

    def suggest(drawn: Drawn):
        return answers.facts(drawn), answers.with_blanks(drawn.captions[0])

    with gr.Row():
        with gr.Column():
            picture, known = one_picture(page, tab, given, [text], suggest)
        with gr.Column():
            model = page.choose_model("Fill in")
            text.render()
            button = gr.Button("Say every word", variant="primary")
            reading = gr.State()
            words = gr.HighlightedText(label="Click a word: where did the model look for it?",
                                       visible=False, show_whitespaces=False, show_legend=True,
                                       color_map=COLOURS)
            maps = gr.Image(show_label=False, visible=False, interactive=False, format="png",
                            buttons=[])
            may_read = gr.HTML(visible=False, apply_default_css=False)
            choices = gr.HTML(visible=False, apply_default_css=False)
            known.render()

    def say(checkpoint, path, typed):
        read = answers.read_words(page.model("Fill in", checkpoint), path, typed)
        classes = [(word.text, class_of(word.share)) for word in read.words]
        return ((checkpoint, read), shown(classes), shown(answers.word_table(read)), HIDDEN, HIDDEN)

    def look(said, chosen: gr.SelectData):
        checkpoint, read = said             # the model may have been changed since
        found = pictures.look_for(page.model("Fill in", checkpoint), read, chosen.index)
        return (shown(pictures.maps(found, chosen.index)),
                shown(pictures.mask_row(found, chosen.index)))

    results = [words, choices, maps, may_read]
    page.on([button.click, text.submit], say, [model, picture, text], [reading, *results])
    page.on(words.select, look, reading, [maps, may_read])
    page.on([picture.change, model.change], lambda: [HIDDEN] * 4, None, results)


def class_of(share: float) -> str:
    return SURE if share > 0.5 else UNSURE if share >= 0.05 else UNLIKELY


HIDDEN = gr.update(visible=False)


def shown(value):
    """A component that was invisible, with a value."""
    return gr.update(value=value, visible=True)


def ask_tab(page: Page, tab, given: gr.State):
    question = gr.Textbox(label="Question", value="what colour is the square?", render=False,
                          html_attributes=AS_TYPED)

    def suggest(drawn: Drawn):
        return answers.answers_known(drawn), drawn.questions[0][0]

    with gr.Row():
        with gr.Column():
            picture, known = one_picture(page, tab, given, [question], suggest)
        with gr.Column():
            model = page.choose_model("Ask")
            question.render()
            button = gr.Button("Ask", variant="primary")
            found = gr.Label(label="Answers; each has a probability of its own")
            known.render()

    def ask(checkpoint, path, typed):
        typed = answers.checked_text(typed, "a question")
        path = answers.checked_picture(path)
        return dict(answers.predict.ask(page.model("Ask", checkpoint), path, typed))

    page.on([button.click, question.submit], ask, [model, picture, question], found)
    page.on(picture.change, lambda: None, None, found)


def describe_tab(page: Page, tab, given: gr.State):
    def suggest(drawn: Drawn):
        return [answers.facts(drawn)]

    with gr.Row():
        with gr.Column():
            picture, known = one_picture(page, tab, given, [], suggest)
        with gr.Column():
            model = page.choose_model("Describe")
            how = gr.Radio(list(answers.HOW), value="Greedy", label="How",
                           info="; ".join(f"{name}: {says}" for name, says in answers.HOW.items()))
            beams = gr.Slider(2, 10, 5, step=1, label="Beams", visible=False)
            with gr.Group(visible=False) as sampling:
                top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Top p: share of the likeliest "
                                                                 "words that are drawn from")
                temperature = gr.Slider(0.1, 2, 1, step=0.1, label="Temperature")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2 ** 31 - 1)
            button = gr.Button("Describe", variant="primary")
            caption = gr.Textbox(label="Caption")
            truth = gr.Markdown()
            known.render()

    def describe(checkpoint, path, now, *settings):
        said = answers.describe(page.model("Describe", checkpoint), path, *settings)
        return said, answers.verdict(now.drawn.truth(said)) if now.drawn else ""

    how.change(lambda chosen: (gr.update(visible=chosen == "Beam search"),
                               gr.update(visible=chosen == "Sampling")), how, [beams, sampling],
               api_visibility="private")
    page.on(button.click, describe, [model, picture, given, how, beams, top_p, temperature, seed],
            [caption, truth])
    page.on(picture.change, lambda: ("", ""), None, [caption, truth])


# -------------------------------------------------------------------------------------------------
# Tabs about several pictures.

def compare_tab(page: Page, tab, given: gr.State):
    with gr.Row():
        left, right = picture_box("Left"), picture_box("Right")
    draw = gr.Button("Draw me two scenes")
    model = page.choose_model("Compare")
    statement = gr.Textbox(label="Statement", value="both images contain a square",
                           html_attributes=AS_TYPED)
    button = gr.Button("True or false?", variant="primary")
    found = gr.Label(label="The model says")
    known = gr.Markdown()

    def draw_two():
        one, other, said, truth = answers.draw_pair(page.folder, answers.new_seed())
        return one, other, said, answers.known_of_pair(truth)

    def compare(checkpoint, one, other, typed):
        typed = answers.checked_text(typed, "a statement")
        one, other = (answers.checked_picture(path, "two pictures") for path in (one, other))
        share = answers.predict.compare(page.model("Compare", checkpoint), one, other, typed)
        return {"true": share, "false": 1 - share}

    page.on(draw.click, draw_two, None, [left, right, statement, known])
    forget = [event for side in (left, right) for event in (side.upload, side.clear)]
    page.on([*forget, statement.input], lambda: "", None, known)
    page.on([left.change, right.change, statement.change], lambda: None, None, found)
    page.on([button.click, statement.submit], compare, [model, left, right, statement], found)


def search_tab(page: Page, tab, given: gr.State):
    model = page.choose_model("Search")
    scenes = gr.State({})               # file name -> Drawn
    gr.Markdown("### Pictures for a text")
    with gr.Row():
        with gr.Column():
            files = gr.Files(label="Pictures", height=160)
            with gr.Row():
                folder = gr.UploadButton("Choose a folder", file_count="directory")
                draw = gr.Button("Draw me nine scenes")
            text = gr.Textbox(label="Text", value="a red square", html_attributes=AS_TYPED)
            button = gr.Button("Search", variant="primary")
        with gr.Column():
            found = gr.Gallery(label="The best first, with their scores", columns=3, height="auto",
                               object_fit="contain", interactive=False, elem_classes="found")
            left_out = gr.Markdown()

    def draw_nine():
        seed = answers.new_seed()
        drawn = [answers.draw_scene(page.folder, seed + k) for k in range(9)]
        paths = [one.path for one in drawn]
        return paths, paths, {Path(one.path).name: one for one in drawn}, drawn[0].captions[-1]

    def search(checkpoint, typed, paths, known):
        best, missing = answers.search(page.model("Search", checkpoint), typed, paths)
        titled = []
        for path, score in best[:SHOWN]:
            name = Path(path).name
            about = answers.mark(known[name].truth(typed)) if name in known else name
            titled.append((path, f"{score:.2f} {about}"))
        says = [f"{len(best)} pictures, the best {SHOWN} are shown."] if len(best) > SHOWN else []
        if missing:
            says.append("Left out: " + "; ".join(missing[:10])
                        + (f"; and {len(missing) - 10} more" if len(missing) > 10 else ""))
        return titled, "\n\n".join(html.escape(answers.without(page.folder, line)) for line in says)

    page.on(folder.upload, lambda paths: paths, folder, files)
    page.on(draw.click, draw_nine, None, [files, found, scenes, text])
    page.on([button.click, text.submit], search, [model, text, files, scenes], [found, left_out])

    gr.Markdown("### Texts for a picture")
    lines = gr.Textbox(label="Texts, one on each line", lines=5, render=False,
                       value="a red square\na blue circle", html_attributes=AS_TYPED)

    def suggest(drawn: Drawn):
        texts = [*drawn.captions[:2], *answers.wrong_captions(drawn, answers.new_seed())]
        return answers.facts(drawn), "\n".join(sorted(texts))

    with gr.Row():
        with gr.Column():
            picture, known = one_picture(page, tab, given, [lines], suggest)
        with gr.Column():
            lines.render()
            order = gr.Button("Put in order", variant="primary")
            ranked = gr.HTML(apply_default_css=False)
            known.render()

    def rank(checkpoint, path, typed, now):
        best = answers.rank(page.model("Search", checkpoint), path, typed)
        rows = [[f"{score:.2f}", html.escape(said)] for said, score in best]
        if now.drawn:
            for row, (said, _) in zip(rows, best, strict=True):
                row.append(answers.mark(now.drawn.truth(said)))
        return answers.table(["score", "text, the best first", "truth"][:2 + bool(now.drawn)], rows)

    page.on(order.click, rank, [model, picture, lines, given], ranked)
    page.on(picture.change, lambda: "", None, ranked)


MODEL_TABS = {"Fill in": fill_tab, "Ask": ask_tab, "Describe": describe_tab,
              "Compare": compare_tab, "Search": search_tab}
assert list(MODEL_TABS) == list(TABS)


# -------------------------------------------------------------------------------------------------
# Masks: needs no model.

def masks_tab(page: Page):
    sentence = "a girl in red plays chess"
    first, about_first = pictures.masks(sentence, "FLM", 0.4, 0, 7)
    with gr.Row():
        with gr.Column():
            text = gr.Textbox(label="Sentence", value=sentence, html_attributes=AS_TYPED)
            objective = gr.Radio(list(pictures.OBJECTIVES), value="FLM", label="Objective")
            rate = gr.Slider(0, 1, 0.4, step=0.05, label="Corruption rate",
                             info="the share of the words that is hidden from each query; at 0 it "
                                  "is the query's own word alone")
            prefix = gr.Slider(1, pictures.MOST_WORDS - 1, 2, step=1, label="Words of the prefix",
                               visible=False)
            again = gr.Button("Draw again", variant="primary")
            says = gr.Markdown(about_first)
        with gr.Column():
            drawn = gr.Image(first, show_label=False, interactive=False, format="png",
                             buttons=["fullscreen"])
            gr.Image(pictures.key(), show_label=False, interactive=False, format="png", buttons=[],
                     container=False, elem_classes="key")

    def draw(*settings):
        return pictures.masks(*settings, answers.new_seed())

    def settings_of(chosen):
        masks = chosen == "MLM"
        about = ("the share of the words that is masked" if masks else
                 "the share of the words that is hidden from each query; at 0 it is the query's "
                 "own word alone")
        return (gr.update(visible=chosen in ("MLM", "FLM"), info=about,
                          label="Share of masked words" if masks else "Corruption rate"),
                gr.update(visible=chosen == "Prefix"))

    objective.change(settings_of, objective, [rate, prefix], api_visibility="private")
    page.on([again.click, text.submit, objective.change, rate.release, prefix.release], draw,
            [text, objective, rate, prefix], [drawn, says])
