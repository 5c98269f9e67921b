"BERTScore: by hand, its symmetries, and models that are none."
import pytest
from hypothesis import given, settings, strategies as st

from medchat.bertscore import LAYERS, add_bert_scores, bert_scores, load_text_model
from medchat.core import MedchatError
from question_maker import question

WORDS = "the heart is enlarged small left right effusion no . pneumothorax".split()
texts = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A BERT of random weights with a vocabulary of eleven words."
    from medchat.models import import_transformers
    tf, out = import_transformers(), tmp_path_factory.mktemp("bert")
    import torch
    torch.manual_seed(0)
    (out/"vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tf.BertTokenizerFast(vocab=str(out/"vocab.txt")).save_pretrained(out)
    tf.BertModel(tf.BertConfig(vocab_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)).save_pretrained(out)
    return out

@pytest.fixture(scope="module")
def bert(folder): return load_text_model(str(folder))

def test_by_hand(bert):
    "The same sums with loops, one text at a time, without padding."
    import torch
    tokenizer, model = bert
    def vectors(text):
        ids = tokenizer(text, return_tensors="pt")
        with torch.no_grad(): return model(**ids, output_hidden_states=True).hidden_states[2][0, 1:-1] # without [CLS] and [SEP]
    a, b = "the heart is enlarged", "small left effusion . no pneumothorax"
    cos = [[torch.cosine_similarity(x, y, dim=0).item() for y in vectors(b)] for x in vectors(a)]
    p, r = sum(map(max, cos))/len(cos), sum(map(max, zip(*cos)))/len(cos[0])
    got, _ = bert_scores([a, "the"], [b, "the heart is enlarged no effusion . no ."], *bert, layer=2) # the second pair makes it pad
    assert got == pytest.approx((p, r, 2*p*r/(p + r)), abs=1e-5)

@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_properties(bert, pairs):
    a, b = map(list, zip(*pairs))
    scores = bert_scores(a, b, *bert)
    for (p, r, f), (rp, rr, rf) in zip(scores, bert_scores(b, a, *bert)):
        assert (p, r, f) == pytest.approx((rr, rp, rf), abs=1e-4) and all(-1.0001 <= x <= 1.0001 for x in (p, r, f))
    alone = [bert_scores([x], [y], *bert)[0] for x, y in pairs]
    assert all(s == pytest.approx(t, abs=1e-4) for s, t in zip(scores, alone)) # no text depends on its neighbours
    for text, s in zip(a, bert_scores(a, a, *bert)): assert s == pytest.approx((1, 1, 1) if text else (0, 0, 0), abs=1e-4)

def test_nothing_and_unequal(bert):
    assert bert_scores([], [], *bert) == []
    with pytest.raises(MedchatError, match="one reference for each"): bert_scores(["a"], [], *bert)

def test_no_model_is_one_line(tmp_path):
    (tmp_path/"config.json").write_text("{}")
    for name in (str(tmp_path), str(tmp_path/"nowhere")): # a name on the Hub would be tried there
        with pytest.raises(MedchatError, match="cannot load the text model") as e: load_text_model(name)
        assert "\n" not in str(e.value)

def test_layers_are_those_of_the_paper(): assert LAYERS["roberta-large"] == 17 and LAYERS["bert-base-uncased"] == 9

def test_it_stands_beside_the_other_scores(folder, bert):
    asked = [question(i, kind="caption", answer_type="open", reference="the heart is enlarged", group=f"p{i}") for i in range(3)]
    found = add_bert_scores({"caption": {"rouge_l": {}}}, asked, ["the heart is enlarged", "the heart is enlarged", ""], str(folder), *bert)["caption"]
    assert set(found) == {"rouge_l", "bert_f1"} and found["bert_f1"]["n"] == 3 and found["bert_f1"]["value"] == pytest.approx(2/3, abs=1e-4) and found["bert_f1"]["model"] == folder.name
