"""One file per flow: enrol, appraise, poll, approve, deliver."""
