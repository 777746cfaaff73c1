"""What became of reports that somebody asks about."""

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Final

from services.metering.store.executing import Connection

ANSWERS_KEPT_SECONDS: Final = 600


async def answer(connection: Connection, answers: Mapping[tuple[int, str], str], *, recorded_at: datetime) -> None:
    """Say what became of reports that somebody asks about. The first answer stands: a repeat would say otherwise."""
    keys = sorted(answers)
    await connection.execute(
        """
        INSERT INTO answers (partition, question, outcome, recorded_at)
        SELECT partition, question, outcome, %s FROM unnest(%s::smallint[], %s::text[], %s::text[])
             AS told (partition, question, outcome)
        ON CONFLICT DO NOTHING
        """,
        [
            recorded_at,
            [partition for partition, _ in keys],
            [question for _, question in keys],
            [answers[key] for key in keys],
        ],
    )


async def take_answers(connection: Connection, questions: Collection[tuple[int, str]]) -> dict[str, str]:
    """What became of those reports that have been looked at, by question. Each is told once."""
    cursor = await connection.execute(
        """
        DELETE FROM answers USING unnest(%s::smallint[], %s::text[]) AS asked (partition, question)
        WHERE (answers.partition, answers.question) = (asked.partition, asked.question)
        RETURNING answers.question, answers.outcome
        """,
        [[partition for partition, _ in questions], [question for _, question in questions]],
    )
    found: dict[str, str] = dict(await cursor.fetchall())
    return found


async def forget_answers(connection: Connection) -> None:
    """Forget what nobody fetched."""
    await connection.execute(
        "DELETE FROM answers WHERE recorded_at < clock_timestamp() - make_interval(secs => %s)",
        [ANSWERS_KEPT_SECONDS],
    )
