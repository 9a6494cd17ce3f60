"""Print one line: the tests that no run executed, counted by reason. Arguments: the JUnit XML of each pytest run."""

import sys
from collections import defaultdict
from xml.etree import ElementTree

executed, reasons = set(), {}
for file in sys.argv[1:]:
    for case in ElementTree.parse(file).iter("testcase"):
        test = case.get("classname"), case.get("name")
        if (skip := case.find("skipped")) is None:
            executed.add(test)
        else:
            reasons[test] = skip.get("message")
left = {test: reason for test, reason in reasons.items() if test not in executed}  # one run may lack what another has
groups = defaultdict(list)
for (module, name), reason in sorted(left.items()):
    groups[reason].append(f"{module.removeprefix('tests.')}::{name.partition('[')[0]}")
texts = [f"{len(names)} because of '{reason}' ({', '.join(dict.fromkeys(names))})" for reason, names in groups.items()]
print(f"Left skipped: {len(left)} of {len(executed | reasons.keys())} tests. {'; '.join(texts)}")
