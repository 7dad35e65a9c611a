# METADATA
# title: Decision log mask
# description: |
#   In OPA's format (`data.system.log.mask`), applied to each decision log entry before it leaves the process. What a
#   token claims about a person is not the log's business: the subject's id, kind and roles stay, its claims go.
package system.log

mask contains "/input/subject/claims" if input.input.subject.claims
