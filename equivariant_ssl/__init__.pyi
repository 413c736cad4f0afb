from equivariant_ssl.api import Classifier as Classifier
from equivariant_ssl.api import Encoder as Encoder
from equivariant_ssl.api import LawError as LawError
from equivariant_ssl.api import Source as Source
from equivariant_ssl.api import Split as Split
from equivariant_ssl.api import UserError as UserError
from equivariant_ssl.api import check_laws as check_laws
from equivariant_ssl.api import evaluate as evaluate
from equivariant_ssl.api import load as load
from equivariant_ssl.api import pretrain as pretrain
from equivariant_ssl.api import study as study
from equivariant_ssl.api import views as views

__version__: str
