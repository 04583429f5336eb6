"""A task for random policies, shared by the tests that train on what they decode."""

from dllm_sd.tasks.task import Grade, Problem


class StubTask:
    """Judges by the last character, so that a random policy is right half of the time."""

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{problem.id[1:]}+1=" if question else "="}]

    def grade(self, problem: Problem, completion: str) -> Grade:
        correct = bool(completion) and ord(completion[-1]) % 2 == 0
        return Grade(correct, float(correct), None)

    def reference(self, problem: Problem) -> str:
        return "12+3=15"

    def final_answer(self, problem: Problem) -> str:
        return "15"
