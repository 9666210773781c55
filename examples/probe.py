"""Probe a media file with ffprobe: its duration for the whole workflow, time points for the next stage."""

import json
import subprocess

from pydantic import BaseModel

from jef_daemon import ActionExecutor, ActionExecutorResponse, ExecutionContext


class Probe(ActionExecutor):
    """Reads a media file's duration, and picks points of time for pictures."""

    action = "probe"

    class Configuration(BaseModel):
        path: str
        points: int = 3
        """Pictures that are wanted."""

    def execute(self, context: ExecutionContext[Configuration]) -> ActionExecutorResponse:
        wanted = context.configuration
        words = [
            "ffprobe",
            "-v",
            "error",
            "-show_entries",
            "format=duration,format_name",
            "-of",
            "json",
            wanted.path,
        ]
        told = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)["format"]
        duration = float(told["duration"])
        points = [round(duration * (number + 0.5) / wanted.points, 3) for number in range(wanted.points)]
        return ActionExecutorResponse(
            result=f"{told['format_name']}, {duration:.1f} s",
            job_context_variables={"points": points},
            workflow_context_variables={"duration": duration},
        )
