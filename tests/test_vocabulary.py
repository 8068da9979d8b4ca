"""The code and its prose use the field's terms: replaced names and dialect words do not return."""

import io
import json
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# names that were replaced by the field's terms, as identifiers of Python code
REPLACED_NAMES = set(
    """
    AHEAD ALIKE AROUND AS_USER About Aside Attempt BASIS BEST BOUGHT Because Board CONFINED
    COOLING Chain Challenge Checked Crew DEPTH DRAWN EFFORTLESS ENOUGH EVERY Effort Exam FATES
    FIRST_DAYS FOUND FUSION Find FullError GOOD Good Guard HM_JOB Her INK Ids KEEP KILLED KIN Kin
    Known LARGER LEARN_FROM LEDGER LOADS LOOK Learner Lesson Loaded ME Moved NOT_PART NO_FILL
    Needs OF_AGE OF_ALL OF_DEPARTMENT OF_PRODUCT PAUSE PEERS POWERS Pad RELATION RIVALS SEARCHED
    SELLABLE SELLING SHOWN SIDE_BY_SIDE STAGE_OF STAND_IN STATE STRANGER STRANGERS STRAY Seen
    Shelves Shop StateError Switch TELL_SECONDS TOGETHER TUNE_ON Trained Trainers Turn Verdict
    WAITING WARM Walk Watch World _Here _OnS3 _WithLake _added _again _alike _as_before _ask
    _attempts _begun _behind _both_ways _companion _counted _described _fewest _fill _fill_row
    _fill_sums _fixed _flat _follow _give_back _hand_over _handed_out _homes _incidence _keep
    _knock _layered _like_above _line _listed _make_room _misfit _moved _near _newest _note
    _numbered _parts _place _plainly _rank _rarity _relate _renamed _rule_out _run_there _sensible
    _sibling _side_by_side _simple _sink _some _sweep_temporary _teach _through_all _told
    _unbought _walk _watched _way _ways _weekly _whole _with_nobody _worse _worth about_tower
    accept_new accept_new_columns again ago alarm alike always anew answer_id answering answers
    article_state as_frame as_rows as_words aside asked at_once at_visit backs bad ballast basis
    basis_of beside best better broken bundles_of called came ceiling chains_on challenge
    check_keys chosen clicked code_key compiled cooled count_sales counted current_loads dearest
    department_sales does_not_fit drawing_of drawn edited_by_hand enough_trees enter enter_loads
    enter_model everybody everyone exam_of fade fates few_dates fill_shelves find_file fitted
    folders_of follow_job found_by_name given gone ground hear heard here hers hex_of in_order
    in_threads in_words is_ready judged keep_run kept kin kin_customer kin_of known_key ladder
    largest last_read later lead leak_safe_since ledger left_gone levels like like_you likeness
    load_ballast local_path losers lost make_world map_on max_aside max_set_aside may mine misses
    modules_key most moved named_run near near_in_space near_last new_like_hers newest_kin
    newest_version next_visit nobody noted nothing number_of one only_read open_forest open_ids
    open_shop open_space open_week opening origin_of other own own_history own_purchases pad_for
    paired passes perform popular_with_age popularity_slice portraits processed product_of propose
    proposed purchases_ put_file put_scores read_and_written read_as read_content read_ledger
    read_scores read_vouched rebuy_gap rebuy_rate rebuying rebuys refusal_of refused rehearse
    remap report_on restocked reuse riddles rising rows_of said says scored see_newest
    seen_at_once share_last shared she shelf shifted shifts short_by simple slice_table some_of
    somebody stage_of stage_set stamp stock_at stories strange stranger strangers stray take_back
    tell_all tells tenths theirs there thin thinned tick time_limit to_table todo together told
    tower trainers_of tries twig two unit_rows unreadable updated vanished verdict versions_in_use
    visit_of vouch vouched wanted wares warmth weekly_buyers what what_changed whom wins
    with_lists with_state with_stock with_visit workings
""".split()  # noqa: SIM905 - a list of 400 strings would not be read
)
GENDERED = r"\b(?:she|hers?|herself|he|his|him|himself)\b"
DIALECT = re.compile(
    rf"{GENDERED}|\bbeside\b|\b(?:no|some|every|any)body\b|\bby lot\b|\bset aside\b|\baside\b"
    r"|\btold\b|\btells?\b(?!\()|\bsample world\b|\binvented shop\b|\bsimple methods?\b"
    r"|\bstrangers?\b|\bvouch\w*|\btakes? back\b|\btook back\b|\bledgers?\b|\bjudged?\b"
    r"|\bladder\b|\bexams?\b|\bcooled\b",
    re.IGNORECASE,
)
CODE = ("nbs", "runner", "deploy", "reports")
PROSE = (*CODE, "docs", "hm_reco/api/templates", "README.md", "CONTRIBUTING.md")


def list_files(*names: str) -> list[Path]:
    """Files that git knows, in these folders."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "--", *names]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file() and path.suffix not in (".svg", ".lock")]


def read_sources(path: Path) -> Iterator[str]:
    """The text of a file; of a notebook, the source of each cell."""
    if path.suffix == ".ipynb":
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            yield "".join(cell["source"])
    else:
        yield path.read_text(encoding="utf-8")


def read_names(source: str) -> set[str]:
    """The identifiers of Python code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def find_replaced_names(path: Path) -> set[str]:
    if path.suffix == ".py":
        return read_names(path.read_text(encoding="utf-8")) & REPLACED_NAMES
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return {name for source in code for name in read_names(source)} & REPLACED_NAMES


def find_dialect(source: str) -> list[str]:
    """Lines with a word of the dialect, and the word."""
    return [
        f"{match[0]!r} in {line.strip()[:80]!r}"
        for line in source.splitlines()
        for match in DIALECT.finditer(line)
    ]


CODE_FILES = [path for path in list_files(*CODE) if path.suffix in (".py", ".ipynb")]
PROSE_FILES = list_files(*PROSE)


def test_vocabulary_reads_all_parts():
    assert len(CODE_FILES) > 100 and len(PROSE_FILES) > len(CODE_FILES) > 0


@pytest.mark.parametrize("path", CODE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_has_no_replaced_name(path):
    assert find_replaced_names(path) == set()


@pytest.mark.parametrize("path", PROSE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_has_no_dialect(path):
    found = [line for source in read_sources(path) for line in find_dialect(source)]
    assert found == []


@pytest.mark.parametrize("folder", ["tests", "bench", "config", ".github"])
def test_no_gendered_word_elsewhere(folder):
    pattern = re.compile(GENDERED, re.IGNORECASE)
    for path in list_files(folder):
        if path != Path(__file__):
            for source in read_sources(path):
                assert not pattern.findall(source), path


def test_vocabulary_finds_what_it_forbids(tmp_path):
    """A planted name and a planted sentence are reported."""
    path = tmp_path / "planted.py"
    path.write_text("kin_of = near_last(shop)\n")
    assert find_replaced_names(path) == {"kin_of", "near_last"}
    assert find_dialect("What she bought is told to nobody.") != []
