"""Pages in other languages than English that the quickstart plants in its corpus: (language, title, paragraphs)."""

OTHER_LANGUAGES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "de",
        "Wie ein Sprachmodell lernt",
        (
            "Ein Sprachmodell lernt, das nächste Wort eines Textes vorherzusagen. Dafür liest es sehr viele Seiten, und "
            "nach jeder Vorhersage wird geprüft, wie weit sie vom wirklichen Wort entfernt war. Aus diesem Abstand "
            "berechnet das Programm, in welche Richtung jedes einzelne Gewicht ein wenig verschoben werden muss, damit der "
            "Fehler beim nächsten Mal kleiner ist.",
            "Entscheidend ist nicht nur die Menge der Texte, sondern auch ihre Güte. Seiten, die nur aus Menüs und Werbung "
            "bestehen, bringen dem Modell wenig bei, und Texte, die hundertfach kopiert wurden, verleiten es dazu, sie "
            "auswendig zu lernen. Deshalb werden Doppelgänger entfernt, bevor das eigentliche Training beginnt, und jede "
            "Entscheidung wird gezählt.",
        ),
    ),
    (
        "fr",
        "Pourquoi nettoyer un corpus",
        (
            "Avant d'entraîner un modèle de langue, il faut préparer les textes avec soin. Les pages du web contiennent des"
            " menus, des annonces, des formulaires et des mentions légales qui n'apprennent presque rien sur la langue. On "
            "garde donc le texte principal de chaque page et l'on écarte tout ce qui l'entoure, en notant à chaque fois la "
            "raison de cette décision.",
            "Il faut aussi chercher les copies. Une même dépêche paraît souvent sur des dizaines de sites, avec une date ou"
            " un titre un peu différents. Si l'on ne retire pas ces doublons, le modèle les apprend par cœur et perd une "
            "partie de sa capacité à parler d'autre chose. Le calcul est long, mais il se fait une seule fois et profite à "
            "toutes les expériences suivantes.",
        ),
    ),
    (
        "es",
        "Cómo se reparte el trabajo entre varias máquinas",
        (
            "Cuando un modelo es demasiado grande para una sola tarjeta, su memoria se reparte entre varias. Cada una "
            "guarda una parte de los pesos y del estado del optimizador, y las demás la piden justo en el momento en que la"
            " necesitan. Así, un grupo de máquinas modestas puede entrenar un modelo que ninguna de ellas podría contener "
            "por sí sola.",
            "El precio de esta solución es la comunicación. Las máquinas pasan una parte del tiempo enviándose números, y "
            "si la red es lenta, esperan más de lo que calculan. Por eso conviene medir con cuidado cuánto dura cada paso, "
            "qué parte corresponde al cálculo y qué parte a la espera, antes de comprar más equipos o de cambiar el "
            "programa.",
        ),
    ),
    (
        "it",
        "Salvare e riprendere un addestramento",
        (
            "Un addestramento può durare settimane, e in tutto questo tempo qualcosa andrà storto: una macchina si spegne, "
            "un disco si riempie, qualcuno ha bisogno dei calcolatori per un lavoro più urgente. Per questo motivo il "
            "programma salva a intervalli regolari tutto ciò che serve per continuare: i pesi, lo stato dell'ottimizzatore "
            "e la posizione nei dati.",
            "Quando il lavoro riparte, legge l'ultimo salvataggio intero e prosegue come se non fosse successo nulla. Se un"
            " file è danneggiato, se ne accorge e torna a quello precedente, dicendo quale ha scartato e perché. Chi ha "
            "perso una volta dieci giorni di calcolo sa che questa parte del programma merita la stessa cura del modello "
            "stesso.",
        ),
    ),
    (
        "pt",
        "O que mede a perplexidade",
        (
            "A perplexidade diz, em média, entre quantas palavras igualmente prováveis o modelo hesita quando precisa "
            "escolher a próxima. Um modelo que não aprendeu nada hesita entre todas as palavras do vocabulário; um modelo "
            "que já leu muitos livros hesita entre poucas dezenas. O valor só pode ser comparado quando os textos foram "
            "divididos da mesma maneira.",
            "Por essa razão muitos autores preferem contar os bits por byte, que não dependem do vocabulário escolhido. "
            "Também é preciso cuidado com os textos de avaliação: se alguns deles apareceram durante o treino, o resultado "
            "parece melhor do que é. Uma boa prática é separar esses textos antes de começar e procurar cópias deles em "
            "todo o material restante.",
        ),
    ),
    (
        "nl",
        "Waarom woorden in stukjes worden geknipt",
        (
            "Een taalmodel leest geen hele woorden maar stukjes daarvan. Veelvoorkomende woorden blijven heel, terwijl "
            "zeldzame woorden worden opgedeeld in delen die vaker voorkomen. Zo kan het model met een beperkte lijst van "
            "stukjes toch elke zin lezen en schrijven, ook als er een naam of een tikfout in staat die het nog nooit eerder"
            " heeft gezien.",
            "De lijst van stukjes wordt vooraf gemaakt op grond van een deel van de teksten. Het programma begint met losse"
            " letters en voegt telkens het paar samen dat het vaakst naast elkaar staat, totdat de lijst lang genoeg is. "
            "Wie later een andere lijst wil gebruiken, moet helemaal opnieuw beginnen, want het model kent alleen de "
            "nummers van de oude stukjes.",
        ),
    ),
    (
        "pl",
        "Kolejka zadań na wspólnym klastrze",
        (
            "Na dużym klastrze pracuje wiele zespołów, a komputerów nigdy nie wystarcza dla wszystkich naraz. Dlatego każde"
            " zadanie trafia do kolejki, w której czeka na wolne maszyny. Program zarządzający zna czas trwania zadań, ich "
            "pierwszeństwo oraz wymagania dotyczące pamięci i stara się ułożyć je tak, żeby jak najmniej sprzętu stało "
            "bezczynnie.",
            "Zadanie, które przekroczy swój czas, zostaje przerwane, ale wcześniej dostaje ostrzeżenie. Dobrze napisany "
            "program zapisuje wtedy swój stan na dysku i kończy pracę, a po ponownym uruchomieniu kontynuuje od tego samego"
            " miejsca. Użytkownik widzi w dzienniku tylko krótką przerwę i nie musi niczego robić ręcznie ani pilnować "
            "obliczeń w nocy.",
        ),
    ),
    (
        "ru",
        "Как проверить, что данные не потеряны",
        (
            "Когда обучение длится несколько недель и много раз прерывается, легко потерять часть данных или прочитать одну"
            " и ту же часть дважды. Чтобы этого не случилось, программа записывает для каждого шага контрольную сумму всех "
            "прочитанных текстов. В конце эти суммы сравнивают с теми, которые можно вычислить прямо из файлов, и любое "
            "расхождение сразу становится заметным.",
            "Такая проверка почти ничего не стоит, потому что сумма считается очень быстро. Зато она отвечает на вопрос, "
            "который иначе остаётся без ответа: видела ли модель каждый пример ровно один раз? Если порядок чтения зависит "
            "только от номера шага, то после остановки работу можно продолжить с любого места, и результат будет точно "
            "таким же, как без остановки.",
        ),
    ),
)
