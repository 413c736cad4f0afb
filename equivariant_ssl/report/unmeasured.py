"""What `eqssl eval` has not measured of a run yet, and the one command that measures all of it."""
from equivariant_ssl.errors import UserError
from equivariant_ssl.evaluate.protocols import DEFAULT, GROUPS, PROTOCOLS
from equivariant_ssl.report import results
from equivariant_ssl.report.page import Missing
from equivariant_ssl.report.run_folder import RunFolder
from equivariant_ssl.training.recipe import build_objectives

AT_THE_TOP = 'The command is under Results.'  # where `block` stands


def predicts_embeddings(folder: RunFolder) -> bool:
  """Return whether an objective of a run predicts where an embedding goes."""
  try:
    objectives = build_objectives(folder.config, 0)[1]
  except UserError:  # a module of another package that this command may not import
    return False
  return any(objective.predicts == 'target' for objective in objectives.values())


def has_accuracies(folder: RunFolder) -> bool:
  """Return whether images of a run can be classified: unless its data card says otherwise."""
  return folder.labeled is not False and folder.tested is not False


def protocols(folder: RunFolder) -> list[str]:
  """Return the protocols that a run can have, of the default ones and those about equivariance, and
  that were not measured. Those that need labels are left out where there is some accuracy."""
  lacking = {'labels': bool(results.accuracies(folder)) or not has_accuracies(folder),
             'target': not predicts_embeddings(folder), '': False}
  done = {result['protocol'] for result in folder.results.values()}
  return [name for name in dict.fromkeys((*DEFAULT, *GROUPS['equivariance']))
          if name not in done and not lacking[PROTOCOLS[name].needs]]


def blocks(folder: RunFolder) -> list[Missing]:
  """Return the block that says what was not measured yet, and the command; [] where all was."""
  names = protocols(folder)
  if not names:
    return []
  # `eqssl eval` leaves out by itself what is in these groups and cannot be measured, or costs days.
  groups = next((one for one in ('default', 'equivariance') if set(names) <= set(GROUPS[one])),
                'default,equivariance')
  option = '' if groups == 'default' else f'--protocol {groups}'
  return [Missing(f'Not measured yet: {", ".join(names)}. One command measures all of it:'
                  if len(names) > 1 else f'Not measured yet: {names[0]}.',
                  folder.command('eval', option))]
